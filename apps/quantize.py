"""Quantise a checkpoint folder of FP16, BF16 or FP32 weights to INT8 or INT4.

The source may be pickled shards or safetensors. The weights of the four linears of each block become integers with a
scale for each row; everything else is copied. Tensors are read, quantised and written one by one, so that the memory
needed does not grow with the model: for the 6B model 0.6 GB, beside which the largest tensors are mapped from their
files. A run that is stopped leaves no checkpoint behind that looks complete.
"""

import argparse

from .arguments import size
from .imports import imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FP16_FOLDER", help="folder of FP16, BF16 or FP32 weights")
    parser.add_argument("destination", metavar="INT8_FOLDER", help="folder to write")
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8, help="width of the weights")
    parser.add_argument("--shard-size", type=size, default="1GB", help="largest file")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in INT8_FOLDER")


def run(arguments: argparse.Namespace) -> None:
    with imports():
        from .quantize_folder import quantize_folder
    quantize_folder(
        arguments.source,
        arguments.destination,
        arguments.bits,
        arguments.shard_size,
        overwrite=arguments.overwrite,
    )
