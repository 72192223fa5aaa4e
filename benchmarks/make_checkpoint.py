"""Writes a checkpoint folder of random weights in the shape of ChatGLM-6B-INT8, to measure without the real one.

    python benchmarks/make_checkpoint.py --output FOLDER [--layers 28] [--hidden-size 4096] [--vocabulary FILE]

Its answers are noise, but its scores are finite in FP16, and it takes the time and the memory of the real model. The
default has 6.7 GB; one tensor is in memory at a time. The special ids of the default are those of the release, and so
`--vocabulary` wants the release's `ice_text.model` there; any other vocabulary brings its own special ids. Without
one the folder has no tokenizer.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from chatglm_int8 import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm_int8.apps.model_folder import copy_code, write_shards

DEVIATION = 0.02  # of all weight matrices
SLICE_NUMEL = 1 << 24  # normal numbers are drawn in fp32, so many at a time


def write_checkpoint(
    folder: str | os.PathLike,
    config: ChatGLMConfig,
    seed: int = 0,
    vocabulary: str | os.PathLike | None = None,
    progress: bool = True,
) -> None:
    """Write a folder of random weights, FP16 where they are not integers.

    Args:
        config: the shape; `quantization_bit` 0 gives FP16 weights throughout.
        seed: the same seed and configuration give the same weights.
        vocabulary: an `ice_text.model` to copy; the special ids of `config` become those in it.
        progress: show a progress bar on stderr.

    Raises:
        OSError: no such vocabulary, or too small a disk.
        ValueError: a vocabulary that is broken or larger than the embedding.
    """
    folder = Path(folder)
    if vocabulary is not None:
        tokenizer = ChatGLMTokenizer(vocabulary, num_image_tokens=0)
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"{vocabulary} has {len(tokenizer)} pieces, the embedding {config.vocab_size} rows.")
        for field in ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id"):
            setattr(config, field, getattr(tokenizer, field))
    with torch.device("meta"):
        state = ChatGLMForConditionalGeneration(config).state_dict()
    del state["lm_head.weight"]  # tied
    layout = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}

    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, layout, _draw(layout, config.quantization_bit, seed), progress=progress)
    if vocabulary is not None:
        tokenizer.save_pretrained(folder)
    copy_code(folder)
    config.dtype = torch.float16
    config.architectures = ["ChatGLMForConditionalGeneration"]
    config.save_pretrained(folder)


def _draw(layout: dict[str, torch.Tensor], bits: int, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = np.random.Generator(np.random.SFC64(seed))
    for name, meta in layout.items():
        if meta.dtype == torch.int8:
            tensor = torch.frombuffer(bytearray(generator.bytes(meta.numel())), dtype=torch.int8).view(meta.shape)
        elif name.endswith("weight_scale"):
            # Integers spread evenly up to ±q have a standard deviation of q/√3.
            tensor = torch.full(meta.shape, DEVIATION * math.sqrt(3) / (2 ** (bits - 1) - 1), dtype=torch.float16)
        elif name.endswith("layernorm.weight"):
            tensor = torch.ones(meta.shape, dtype=torch.float16)
        elif name.endswith("bias"):
            tensor = torch.zeros(meta.shape, dtype=torch.float16)
        else:
            tensor = torch.empty(meta.shape, dtype=torch.float16)
            for part in tensor.view(-1).split(SLICE_NUMEL):
                normal = generator.standard_normal(part.numel(), dtype=np.float32)
                part.copy_(torch.from_numpy(normal).mul_(DEVIATION))
        yield name, tensor


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes random weights in the shape of ChatGLM-6B-INT8.")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--layers", type=int, default=28, help="blocks (default: 28)")
    parser.add_argument("--hidden-size", type=int, default=4096, help="multiple of 128, the head width (default: 4096)")
    parser.add_argument("--bits", type=int, choices=(8, 4, 0), default=8, help="0 = FP16 (default: 8)")
    parser.add_argument("--vocabulary", metavar="FILE", help="the release's ice_text.model, to be copied")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        config = ChatGLMConfig(
            num_layers=arguments.layers,
            hidden_size=arguments.hidden_size,
            num_attention_heads=max(1, arguments.hidden_size // 128),
            quantization_bit=arguments.bits,
        )
        write_checkpoint(arguments.output, config, arguments.seed, arguments.vocabulary)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
