"""Model folders with changes: LoRA added to the weights, other bits, another P-Tuning v2 prefix."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from .. import ChatGLMConfig, ChatGLMForConditionalGeneration, checkpoint, quantization
from .lora_adapter import Lora
from .model_folder import GIGABYTE, QUANTIZED, inspect_folder, read, write_folder

PREFIX = "transformer.prefix_encoder."


def rewrite_folder(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    bits: int | None = None,
    lora: Lora | None = None,
    prefix: dict[str, torch.Tensor] | None = None,
    shard_size: int = GIGABYTE,
    progress: bool = True,
    overwrite: bool = False,
) -> None:
    """Write the checkpoint in `source` to `destination` with changes.

    Args:
        bits: of the new weights, 8, 4 or 0 (float); by default as many as before. Weights that keep their bits and
            have no LoRA are copied as they are.
        lora: added to the weights, in float32.
        prefix: put in, or in the place of the one that is there: tensors as `checkpoint.read_prefix` returns them.
        shard_size, progress, overwrite: as of `quantize_folder.quantize_folder`.

    Raises:
        OSError: the source is missing or damaged, the destination holds a checkpoint, the disk is too small.
        ValueError: a LoRA or prefix of a model with another shape, or with numbers that are not finite.
    """
    source, destination = Path(source), Path(destination)
    config, stored = inspect_folder(source)
    old_bits = config.quantization_bit
    bits = old_bits if bits is None else bits
    prefix = prefix or {}
    if prefix:
        stored = {name: place for name, place in stored.items() if PREFIX.split(".")[1] not in name}
        _describe_prefix(config, prefix)

    layout, changed, shapes = {}, set(), {}
    for name, (_, tensor) in stored.items():
        linear = name.removesuffix(".weight").removeprefix("transformer.")
        if not QUANTIZED.search(name):
            if not name.endswith(".weight_scale"):
                layout[name] = tensor
            continue
        rows, columns = tensor.shape
        columns = columns * 8 // old_bits if old_bits else columns
        dtype = stored[f"{name}_scale"][1].dtype if old_bits else tensor.dtype
        shapes[linear] = rows, columns
        if bits != old_bits or (lora and linear in lora.pairs):
            changed.add(name)
        if bits:
            layout[name] = torch.empty(rows, columns * bits // 8, dtype=torch.int8, device="meta")
            layout[f"{name}_scale"] = torch.empty(rows, dtype=dtype, device="meta")
        else:
            layout[name] = torch.empty(rows, columns, dtype=dtype, device="meta")
    if lora:
        lora.check(shapes)
    layout.update({PREFIX + name: tensor.to("meta") for name, tensor in prefix.items()})

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in layout:
            if name.removesuffix("_scale") in changed:
                if not name.endswith("_scale"):
                    linear = name.removesuffix(".weight").removeprefix("transformer.")
                    pair = lora.pairs.get(linear) if lora else None
                    yield from _changed(stored, name, old_bits, bits, pair, layout)
            else:
                yield (
                    name,
                    prefix[name.removeprefix(PREFIX)] if name.startswith(PREFIX) and prefix else read(stored, name),
                )

    config.quantization_bit = bits
    write_folder(source, destination, config, layout, tensors(), shard_size, progress, overwrite)


def _changed(stored, name, old_bits, bits, pair, layout) -> Iterator[tuple[str, torch.Tensor]]:
    """A linear's weight with LoRA's A, B and scaling added, and its scales if it is to be quantised."""
    weight = read(stored, name)
    if old_bits:
        weight = quantization.dequantize_weight(weight, read(stored, f"{name}_scale"), old_bits, torch.float32)
    else:
        weight = weight.float()
    if pair is not None:
        a, b, scaling = pair
        weight.addmm_(b.float(), a.float(), alpha=scaling)
    if not weight.isfinite().all():
        raise ValueError(f"{name} would have NaN or infinite numbers: the adapter or the model is damaged.")
    if bits:
        weight, scale = quantization.quantize_weight(weight, bits)
        yield name, weight
        yield f"{name}_scale", scale.to(layout[f"{name}_scale"].dtype)
    else:
        yield name, weight.to(layout[name].dtype)


def _describe_prefix(config: ChatGLMConfig, prefix: dict[str, torch.Tensor]) -> None:
    """Note a prefix in the configuration; raises ValueError if the model can't have it."""
    config.pre_seq_len = len(prefix["embedding.weight"])
    config.prefix_projection = "trans.0.weight" in prefix
    with torch.device("meta"):
        state = ChatGLMForConditionalGeneration(config).state_dict()
    expected = {name.removeprefix(PREFIX): list(t.shape) for name, t in state.items() if name.startswith(PREFIX)}
    got = {name: list(tensor.shape) for name, tensor in prefix.items()}
    if got != expected:
        raise ValueError(f"The prefix was made for a model of another shape: expected {expected}, got {got}.")


def export_prefix(source: str | os.PathLike, destination: str | os.PathLike) -> None:
    """Write `transformer.prefix_encoder.*` of a checkpoint to a file, .safetensors or a pickled .bin."""
    prefix = {PREFIX + name: tensor.contiguous() for name, tensor in checkpoint.read_prefix(source).items()}
    destination = Path(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(destination.name + ".partial")
    if destination.suffix == ".safetensors":
        save_file(prefix, partial, metadata={"format": "pt"})
    elif destination.suffix in (".bin", ".pt"):
        torch.save(prefix, partial)
    else:
        raise ValueError(f"{destination}: name the prefix's file .safetensors, or .bin for the public scripts.")
    os.replace(partial, destination)
    print(f"{destination}: {sum(t.numel() for t in prefix.values()):,} numbers, {destination.stat().st_size:,} bytes")
