"""INT8 and INT4 weights out of float ones, folder by folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import quantization
from .model_folder import GIGABYTE, QUANTIZED, inspect_folder, read, write_folder


def quantize_folder(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    bits: int = 8,
    shard_size: int = GIGABYTE,
    progress: bool = True,
    overwrite: bool = False,
) -> None:
    """Write the checkpoint in `source` to `destination`, quantised to 8 or 4 bits.

    Args:
        shard_size: the most bytes of tensors in one file, unless one tensor alone has more.
        progress: show a progress bar on stderr, if that is a terminal.
        overwrite: replace a checkpoint in `destination`, once the new one is complete.

    Raises:
        OSError: the source is missing or damaged, the destination holds a checkpoint, the disk is too small.
        ValueError: the source is quantised already, or its weights and its config.json disagree.
    """
    source, destination = Path(source), Path(destination)
    quantization.check_bits(bits)
    config, stored = inspect_folder(source)
    if config.quantization_bit:
        raise ValueError(f"{source} is quantised already: quantise the FP16 weights that it was made from.")
    layout = {}
    for name, (_, tensor) in stored.items():
        layout[name] = tensor
        if QUANTIZED.search(name):
            rows, columns = tensor.shape
            layout[name] = torch.empty(rows, columns * bits // 8, dtype=torch.int8, device="meta")
            layout[f"{name}_scale"] = torch.empty(rows, dtype=tensor.dtype, device="meta")
    config.quantization_bit = bits
    write_folder(source, destination, config, layout, _quantized_tensors(stored, bits), shard_size, progress, overwrite)


def _quantized_tensors(stored: dict[str, tuple[str, torch.Tensor]], bits: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name in stored:
        tensor = read(stored, name)
        if QUANTIZED.search(name):
            try:
                weight, scale = quantization.quantize_weight(tensor, bits)
            except ValueError as error:
                raise ValueError(f"{name} in {stored[name][0]}: {error}") from error
            yield name, weight
            yield f"{name}_scale", scale.to(tensor.dtype)
        else:
            yield name, tensor
