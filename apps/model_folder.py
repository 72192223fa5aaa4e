"""Reading and writing model folders, one tensor in memory at a time.

A run that is stopped, however, leaves no checkpoint behind that looks complete: files are made in `.partial` inside
the destination and moved up at the end, config.json last. The same command then starts over.
"""

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.dynamic_module_utils import get_relative_import_files

from .. import ChatGLMConfig, ChatGLMForConditionalGeneration, checkpoint

GIGABYTE = 10**9
QUANTIZED = re.compile(
    r"\.(attention\.query_key_value|attention\.dense|mlp\.dense_h_to_4h|mlp\.dense_4h_to_h)\.weight$"
)
COPIED_FILES = (
    "ice_text.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "MODEL_LICENSE",
)
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
}


def write_folder(
    source: Path,
    destination: Path,
    config: ChatGLMConfig,
    layout: dict[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    shard_size: int = GIGABYTE,
    progress: bool = True,
    overwrite: bool = False,
) -> None:
    """Write a model folder that loads like any other, with the tokenizer of `source`; all of it or nothing.

    Args:
        layout, tensors: as of `write_shards`.
        shard_size, progress, overwrite: as of `quantize_folder.quantize_folder`.

    Raises:
        OSError: the destination is the source or holds a checkpoint, the disk is too small.
    """
    partial = destination / ".partial"
    if destination.exists() and source.samefile(destination):
        raise OSError(f"{destination} is the source itself: give another folder for the result.")
    # An unfinished run of this program may be written over: it takes config.json away before it moves anything.
    unfinished = partial.exists() and not (destination / "config.json").exists()
    if not (overwrite or unfinished) and destination.is_dir() and _holds_checkpoint(destination):
        raise FileExistsError(f"{destination} holds a checkpoint already: pass --overwrite to replace it.")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_shards(partial, layout, tensors, shard_size, progress)
        for name in COPIED_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        config.save_pretrained(partial)
        copy_code(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _move_up(partial, destination)


def inspect_folder(source: Path) -> tuple[ChatGLMConfig, dict[str, tuple[str, torch.Tensor]]]:
    """A checkpoint folder's configuration, and for each tensor to be kept its file and what it is, on the meta device.

    `quantization_bit` is 0 if the weights are not quantised, whatever config.json says.

    Raises:
        OSError: a file that is missing or damaged.
        ValueError: weights that disagree with config.json.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"There is no folder {source}.")
    try:
        fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{source / 'config.json'} is damaged ({error}): download it again.") from error
    if not isinstance(fields, dict):
        raise OSError(f"{source / 'config.json'} holds no configuration: download it again.")
    stored = {}
    for path in checkpoint.weight_files(source):
        stored.update({name: (path, tensor) for name, tensor in checkpoint.read_tensors(path, "meta").items()})
    if not stored:
        raise FileNotFoundError(f"{source} has no weight files, neither safetensors nor pytorch_model.bin.")
    if not any(name.endswith(".weight_scale") for name in stored):
        fields["quantization_bit"] = 0  # the release's FP16 configuration does not mention it
    config = ChatGLMConfig.from_dict(fields)
    # The code goes into the folder, also where the source took it from a repository ("owner/name--module.Class").
    config.auto_map = {name: reference.split("--")[-1] for name, reference in config.auto_map.items()}
    with torch.device("meta"):
        expected = ChatGLMForConditionalGeneration(config).state_dict()
    checkpoint.check_checkpoint(source, expected, config.quantization_bit)

    stored = {name: place for name, place in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    head, embedding = "lm_head.weight", "transformer.word_embeddings.weight"
    if head in stored and embedding in stored and torch.equal(read(stored, head), read(stored, embedding)):
        del stored[head]  # the loader ties them
    return config, stored


def read(stored: dict[str, tuple[str, torch.Tensor]], name: str) -> torch.Tensor:
    """One of the tensors that `inspect_folder` found."""
    # The file is mapped anew for each tensor, so that the pages of those before it do not stay in memory.
    return checkpoint.read_tensors(stored[name][0], "cpu", only=name)[name]


def _holds_checkpoint(folder: Path) -> bool:
    return any(path.name == "config.json" or path.suffix in (".safetensors", ".bin") for path in folder.iterdir())


def _move_up(partial: Path, destination: Path) -> None:
    """Move the finished files to their place; no config.json stands there until all of them do."""
    (destination / "config.json").unlink(missing_ok=True)
    for pattern in ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"):
        for path in destination.glob(pattern):
            path.unlink()
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, destination / path.name)
    partial.rmdir()


def write_shards(
    folder: Path,
    layout: dict[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    shard_size: int = GIGABYTE,
    progress: bool = True,
) -> None:
    """Write `model.safetensors`, or shards and their index, holding one tensor in memory at a time.

    Args:
        layout: names with shapes and dtypes, as tensors on the meta device.
        tensors: (name, tensor) in the order of `layout`.
        shard_size, progress: as of `quantize_folder.quantize_folder`.

    Raises:
        OSError: the disk is too small.
        ValueError: the tensors are not those of the layout, or have a dtype that no checkpoint of this model has.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in layout.items():
        if filled and filled + tensor.nbytes > shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    total = sum(tensor.nbytes for tensor in layout.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(f"{folder} needs {total / GIGABYTE:.2f} GB, but its disk has {free / GIGABYTE:.2f} GB left.")

    stream = iter(tensors)
    weight_map = {}
    with tqdm(total=total, unit="B", unit_scale=True, disable=None if progress else True) as bar:
        for number, shard in enumerate(shards, start=1):
            file_name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            _write_shard(folder / file_name, shard, itertools.islice(stream, len(shard)), bar)
            weight_map.update(dict.fromkeys(shard, file_name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, layout: dict[str, torch.Tensor], tensors: Iterator[tuple[str, torch.Tensor]], bar) -> None:
    """One safetensors file: the header's length in 8 bytes, the header in JSON, the tensors.

    The header is known beforehand, and each tensor goes to its offset there as it comes. Readers need tensors at
    multiples of their element's size: the larger elements stand first.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in sorted(layout.items(), key=lambda item: -item[1].itemsize):
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which no ChatGLM checkpoint holds.")
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, expected), (got_name, got) in zip(layout.items(), tensors, strict=True):
            if (name, expected.dtype, expected.shape) != (got_name, got.dtype, got.shape):
                raise ValueError(
                    f"Expected {name}, {expected.dtype} {list(expected.shape)}, to be written; "
                    f"got {got_name}, {got.dtype} {list(got.shape)}."
                )
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(got.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            bar.update(got.nbytes)


def copy_code(folder: Path) -> None:
    """Put the Python files beside a checkpoint that `trust_remote_code=True` needs."""
    package = Path(checkpoint.__file__).parent
    for module in (package / "modeling_chatglm.py", package / "tokenization_chatglm.py"):
        for path in (module, *get_relative_import_files(module)):
            shutil.copyfile(path, folder / Path(path).name)
