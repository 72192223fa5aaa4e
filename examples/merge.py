"""Puts what fine-tuning made into ChatGLM checkpoint folders.

    python examples/merge.py lora MODEL_FOLDER ADAPTER_FOLDER NEW_FOLDER [--bits 8|4|0]
    python examples/merge.py dequantize MODEL_FOLDER NEW_FOLDER
    python examples/merge.py export-prefix TUNED_FOLDER PREFIX_FILE
    python examples/merge.py import-prefix MODEL_FOLDER PREFIX NEW_FOLDER

`lora` adds the LoRA matrices of a PEFT folder to the weights. Quantised weights are expanded, added to and quantised
again, to as many bits as they had or to `--bits` (0: float weights). `export-prefix` writes the P-Tuning v2 prefix of a
checkpoint to a file of its own, and `import-prefix` makes a model folder with a prefix in it, from such a file or a
folder of `finetune.py`. New folders load like any other; tensors are read, changed and written one by one.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import torch
    from quantize import GIGABYTE, QUANTIZED, errors_in_a_line, inspect_folder, parse_size, read, write_folder
    from safetensors.torch import save_file

    from chatglm_int8 import ChatGLMConfig, ChatGLMForConditionalGeneration, checkpoint, quantization
except ModuleNotFoundError as error:
    sys.exit(f"{error}. Install the package first: pip install .   (in the folder above examples)")

LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin")
LORA_NAME = re.compile(r"^(?:base_model\.model\.)?(?:transformer\.)?(.+)\.(lora_[AB])\.weight$")
PREFIX = "transformer.prefix_encoder."


class Lora:
    """The matrices of a PEFT folder.

    Attributes:
        pairs: (A [r, K], B [N, r], scaling) by the name of the linear, as "layers.0.attention.query_key_value".
        folder: where they are from.
    """

    def __init__(self, folder: str | os.PathLike):
        """Raises OSError for a folder that holds no adapter, ValueError for one that can't be merged here."""
        self.folder = Path(folder)
        paths = [self.folder / name for name in LORA_FILES if (self.folder / name).is_file()]
        note = self.folder / "adapter_config.json"
        if not paths or not note.is_file():
            raise FileNotFoundError(f"{folder} has no adapter_config.json with {' or '.join(LORA_FILES)}.")
        try:
            config = json.loads(note.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OSError(f"{note} is damaged ({error}).") from error
        if not isinstance(config, dict) or not isinstance(config.get("lora_alpha", 0), int | float):
            raise OSError(f"{note} is damaged: it holds no configuration of PEFT.")
        if config.get("peft_type") != "LORA":
            raise ValueError(f"{folder} holds {config.get('peft_type')}, not LoRA: only LoRA can be merged.")
        for feature in ("fan_in_fan_out", "enable_lora", "layer_replication"):
            if config.get(feature):
                raise ValueError(f"{folder} was made with {feature}, which can't be merged here.")
        tensors = checkpoint.read_tensors(str(paths[0]), "cpu")
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            match = LORA_NAME.match(name)
            if not match:  # DoRA, trained biases, modules_to_save, embeddings
                raise ValueError(f"{paths[0]} holds {name}, which is more than plain LoRA of linears.")
            found.setdefault(match[1], {})[match[2]] = tensor
        self.pairs = {}
        for name, pair in found.items():
            if pair.keys() != {"lora_A", "lora_B"}:
                raise ValueError(f"{paths[0]} has only {', '.join(pair)} for {name}: it is damaged.")
            rank = len(pair["lora_A"])
            alpha = next(
                (value for key, value in (config.get("alpha_pattern") or {}).items() if _matches(key, name)),
                config.get("lora_alpha", 8),  # PEFT's default
            )
            scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            self.pairs[name] = pair["lora_A"], pair["lora_B"], scaling

    def check(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Raise a ValueError unless each pair fits one of the linears (N, K)."""
        for name, (a, b, _) in self.pairs.items():
            if name not in shapes:
                raise ValueError(
                    f"{self.folder} has LoRA on {name}, which is none of the blocks' linears of the model "
                    f"({', '.join(sorted({name.split('.')[-1] for name in shapes}))} of {len(shapes) // 4} blocks)."
                )
            if (len(b), a.shape[1]) != shapes[name] or b.shape[1] != len(a):
                raise ValueError(
                    f"{self.folder}: the LoRA of {name} is {list(b.shape)} · {list(a.shape)}, but the weight is "
                    f"{list(shapes[name])}: adapter and model belong to different models."
                )


def _matches(key: str, name: str) -> bool:
    """Whether a key of PEFT's patterns means the linear: it is its name, the end of it, or a regular expression."""
    return re.match(rf"(.*\.)?({key})$", f"transformer.{name}") is not None


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
        shard_size, progress, overwrite: as of `quantize.quantize_folder`.

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("lora", help="merge a LoRA into a model")
    expand = commands.add_parser("dequantize", help="make float weights out of INT8 or INT4 ones")
    take = commands.add_parser("export-prefix", help="write a P-Tuning v2 prefix to a file of its own")
    put = commands.add_parser("import-prefix", help="put a P-Tuning v2 prefix into a model")
    take.add_argument("source", metavar="TUNED_FOLDER", help="a checkpoint or model folder that holds a prefix")
    take.add_argument("destination", metavar="PREFIX_FILE", help="file to write, .safetensors or .bin")
    for command in (add, expand, put):
        command.add_argument("source", metavar="MODEL_FOLDER", help="folder of the model")
        if command is add:
            command.add_argument("adapter", metavar="ADAPTER_FOLDER", help="folder that PEFT wrote")
            command.add_argument("--bits", type=int, choices=(8, 4, 0), help="of the new weights (default: as before)")
        if command is put:
            command.add_argument("prefix", metavar="PREFIX", help="file or folder with transformer.prefix_encoder.*")
        command.add_argument("destination", metavar="NEW_FOLDER", help="folder to write")
        command.add_argument("--shard-size", type=parse_size, default="1GB", help="largest file (default: 1GB)")
        command.add_argument("--overwrite", action="store_true", help="replace a checkpoint in NEW_FOLDER")
    arguments = parser.parse_args()
    with errors_in_a_line(parser.prog):
        if arguments.command == "export-prefix":
            export_prefix(arguments.source, arguments.destination)
            return
        changes = {}
        if arguments.command == "lora":
            changes = {"lora": Lora(arguments.adapter), "bits": arguments.bits}
        elif arguments.command == "dequantize":
            changes = {"bits": 0}
        else:
            changes = {"prefix": checkpoint.read_prefix(arguments.prefix)}
        rewrite_folder(
            arguments.source,
            arguments.destination,
            shard_size=arguments.shard_size,
            overwrite=arguments.overwrite,
            **changes,
        )


if __name__ == "__main__":
    main()
