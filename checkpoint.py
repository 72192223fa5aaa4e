"""Weight files: a look over a checkpoint folder before it is loaded, and the reading of P-Tuning v2 prefixes.

Nothing here reads more than the files' headers, except `read_prefix`. Formats: safetensors (a JSON header behind its
length in 8 bytes), PyTorch's zip archives, and the index files that name the shard of each tensor.
"""

import copy
import json
import os
import pickle
import zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig

from .configuration_chatglm import ChatGLMConfig

# In the order in which transformers looks for them.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_LFS_MAGIC = b"version https://git-lfs"


def check_checkpoint(
    folder: str | os.PathLike,
    expected: dict[str, torch.Tensor],
    bits: int,
    tied: bool = True,
    base_prefix: str = "transformer",
) -> None:
    """Compare the weight files of a folder with what a model needs.

    Args:
        folder: a checkpoint folder. One without any weight file passes: the loader has a message for that.
        expected: the model's state dict, which may be on the meta device.
        bits: the configuration's `quantization_bit`.
        tied: its `tie_word_embeddings`: LM head and embedding are one tensor, and one name is enough.
        base_prefix: the class's `base_model_prefix`. As in transformers, the files may be those of the base model or
            of a model around it, whichever the class is; a head that is not in a base model's files is a new one.

    Raises:
        OSError: a file that is missing, cut short, a Git LFS pointer or not a weight file.
        ValueError: a tensor that is missing or whose shape or dtype is not the expected one.
    """
    paths = weight_files(folder)
    if not paths:
        return
    base = f"{base_prefix}."
    found: dict[str, tuple[str, torch.Tensor]] = {}
    is_base_model = True
    for path in paths:
        for name, tensor in read_tensors(path, "meta").items():
            is_base_model &= not name.startswith(base)
            known = (other for other in (name, name.removeprefix(base), base + name) if other in expected)
            found[next(known, name)] = path, tensor
    prefix = {name for name in found if "prefix_encoder." in name}
    if prefix and prefix == found.keys():
        raise ValueError(
            f"{folder} holds nothing but a P-Tuning v2 prefix: load the model that it was trained on, then call "
            "model.load_prefix with this folder."
        )
    if not prefix:  # a fresh one will be made
        expected = {name: tensor for name, tensor in expected.items() if "prefix_encoder." not in name}
    if any(name.startswith(base) for name in expected):
        # Heads of other tasks start from new weights, too.
        new_heads = {name for name in expected if not name.startswith(base) and name not in found}
        if not is_base_model:
            new_heads.discard("lm_head.weight")
        expected = {name: tensor for name, tensor in expected.items() if name not in new_heads}
    one_tensor = {"lm_head.weight", f"{base}word_embeddings.weight"}
    if tied and one_tensor & found.keys():
        expected = {name: tensor for name, tensor in expected.items() if name not in one_tensor - found.keys()}
    missing = [name for name in expected if name not in found]
    if missing:
        scales = all(name.endswith("weight_scale") for name in missing)
        remedy = (
            "The scales of quantised weights are not there: the folder was not saved completely, or its weights are "
            "not quantised and quantization_bit in config.json should be 0."
            if scales
            else "Download or copy the weight files of this model again."
        )
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}. {remedy}")
    for name, tensor in expected.items():
        path, stored = found[name]
        _check_tensor(f"{name} in {path}", stored, tensor, bits)


def read_prefix(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of `transformer.prefix_encoder.*` in a file or a checkpoint folder, without that beginning.

    Raises:
        OSError: no file there, or a damaged one.
        ValueError: no prefix in it.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no file or folder {path}: give the one that holds the prefix.")
    paths = weight_files(path) if os.path.isdir(path) else [os.fspath(path)]
    if not paths:
        raise FileNotFoundError(f"{path} holds none of {', '.join(_WEIGHT_FILES)}: give the prefix's file or folder.")
    prefix = {}
    for file in paths:
        for name, tensor in read_tensors(file, "cpu", only="prefix_encoder.").items():
            prefix[name.split("prefix_encoder.")[1]] = tensor.clone()
    if "embedding.weight" not in prefix:
        raise ValueError(
            f"{path} has no transformer.prefix_encoder.embedding.weight: it is not a P-Tuning v2 checkpoint."
        )
    return prefix


def weight_files(folder: str | os.PathLike) -> list[str]:
    """The paths of a folder's weight files, in the form that transformers would load; empty if there are none.

    Raises:
        OSError: an index that is damaged or a Git LFS pointer.
    """
    for name in _WEIGHT_FILES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            if not name.endswith(".json"):
                return [path]
            _refuse_lfs_pointer(path)
            try:
                with open(path, encoding="utf-8") as file:
                    shards = set(json.load(file)["weight_map"].values())
                if not shards:
                    raise ValueError("it names no file")
                return [os.path.join(folder, shard) for shard in sorted(shards)]
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise OSError(f"{path} is not an index of weight files ({error!r}): download it again.") from error
    return []


def _refuse_lfs_pointer(path: str) -> None:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing, though the index names it: download it, or copy it here.")
    with open(path, "rb") as file:
        if file.read(len(_LFS_MAGIC)) == _LFS_MAGIC:
            raise OSError(
                f"{path} is a Git LFS pointer of {os.path.getsize(path)} bytes, not the file itself: run "
                "`git lfs pull` in its folder, or download the file."
            )


def read_tensors(path: str, device: str, only: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a weight file whose names contain `only`; on the device "meta" nothing but the header is read.

    Raises:
        OSError: a file that is missing, cut short, a Git LFS pointer, or that holds other things than tensors.
    """
    _refuse_lfs_pointer(path)
    cut_short = f"{path} is cut short or damaged ({os.path.getsize(path)} bytes): download it again"
    if path.endswith(".safetensors"):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                names = file.keys()
                names = [name for name in names if only in name]
                if device != "meta":
                    return {name: file.get_tensor(name) for name in names}
                return {name: _meta_tensor(file.get_slice(name)) for name in names}
        except SafetensorError as error:
            raise OSError(f"{cut_short} ({_first_line(error)}).") from error
    is_zip = zipfile.is_zipfile(path)
    if not is_zip:
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                raise OSError(f"{cut_short}.")
    try:
        tensors = torch.load(path, map_location=device, weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise OSError(
            f"{path} is damaged, or holds more than tensors and would run code when unpickled, so it is not read: "
            f"get it from its publisher again ({_first_line(error)})."
        ) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        raise OSError(f"{cut_short} ({_first_line(error)}).") from error
    if not isinstance(tensors, dict):
        raise OSError(f"{path} holds a {type(tensors).__name__}, not tensors by their names: download it again.")
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor) and only in name}


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


# The dtypes of safetensors that a checkpoint of this model may hold.
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
}


def _meta_tensor(tensor_slice) -> torch.Tensor:
    dtype = _SAFETENSORS_DTYPES.get(tensor_slice.get_dtype(), torch.uint8)
    return torch.empty(tensor_slice.get_shape(), dtype=dtype, device="meta")


def _check_tensor(where: str, stored: torch.Tensor, expected: torch.Tensor, bits: int) -> None:
    if stored.dtype == torch.int8 and stored.ndim == expected.ndim == 2 and stored.shape[0] == expected.shape[0]:
        columns = expected.shape[1] * 8 // (bits or 8)
        stored_bits = {columns: 8, columns // 2: 4}.get(stored.shape[1], bits)
        if stored_bits != bits:
            raise ValueError(
                f"{where} is torch.int8 {list(stored.shape)}, a weight of {stored_bits} bits, but config.json has "
                f"quantization_bit = {bits}: set quantization_bit to {stored_bits}."
            )
    if stored.is_floating_point() != expected.is_floating_point():
        raise ValueError(
            f"{where} is {stored.dtype}, but with quantization_bit = {bits} in config.json {expected.dtype} is "
            "expected: for float weights set quantization_bit to 0 and call model.quantize, or get the INT8 files."
        )
    if stored.shape != expected.shape:
        raise ValueError(
            f"{where} has shape {list(stored.shape)}, but by config.json it should be {list(expected.shape)}: "
            "configuration and weights belong to different models."
        )


# What transformers 4 knew and transformers 5 does not; the published scripts and those of its time pass it.
_IDLE_ARGUMENTS = ("resume_download", "code_revision", "torchscript", "use_flash_attention_2")


def _refuse_tensor_parallelism(tp_plan, tp_size: int | None, distributed_config) -> None:
    """Raise a ValueError if tensor, expert or pipeline parallelism is asked for: every GPU would hold all weights."""
    if isinstance(distributed_config, dict):
        given = distributed_config
    else:
        given = {} if distributed_config is None else vars(distributed_config)
    plan = tp_plan if tp_plan is not None else given.get("tp_plan")
    sizes = [tp_size, *(given.get(name) for name in ("tp_size", "ep_size", "pp_size"))]
    if plan is not None or given.get("enable_expert_parallel") or any((size or 1) > 1 for size in sizes):
        raise ValueError(
            "Tensor parallelism (tp_plan, tp_size, distributed_config) can't be used: this model has no plan to split "
            "its weights, so each GPU would hold all of them. For a model too large for one GPU pass "
            'device_map="auto". For more requests a second run replicas: `chatglm ray`, or a server for each GPU.'
        )


def translate_arguments(kwargs: dict) -> None:
    """Bring arguments of transformers 4's `from_pretrained` into the form of transformers 5, in place.

    Raises:
        ValueError: an argument that asks for bitsandbytes or for tensor parallelism.
    """
    _refuse_tensor_parallelism(*(kwargs.get(name) for name in ("tp_plan", "tp_size", "distributed_config")))
    for name in _IDLE_ARGUMENTS:
        kwargs.pop(name, None)
    token = kwargs.pop("use_auth_token", None)
    if token is not None:
        kwargs.setdefault("token", token)
    for bits in (8, 4):
        if kwargs.pop(f"load_in_{bits}bit", False):
            raise ValueError(
                f"load_in_{bits}bit=True asks for bitsandbytes, which is not used here: leave it out. Weights "
                f"that are stored in {bits} bits load so by themselves; for float weights call model.quantize({bits})."
            )


def with_head_at_embedding(device_map: dict, base_prefix: str) -> dict:
    """The device map with the LM head where the embedding is, if one of them is on the disk: they are one tensor."""
    names = ("", base_prefix, f"{base_prefix}.word_embeddings")
    places = [device_map[name] for name in names if name in device_map]
    if "lm_head" in device_map and places and "disk" in (device_map["lm_head"], places[-1]):
        return {**device_map, "lm_head": places[-1]}
    return device_map


def check_folder(model_class: type, folder: str | os.PathLike, config, kwargs: dict) -> None:
    """`check_checkpoint` of a local folder, before `model_class.from_pretrained(folder, config=config, **kwargs)`."""
    if kwargs.get("ignore_mismatched_sizes"):
        return
    shape = copy.deepcopy(config)
    if not isinstance(config, PreTrainedConfig):
        fields = {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype")}
        shape = model_class.config_class.from_pretrained(config or folder, **fields)
    with torch.device("meta"):
        expected = model_class(shape).state_dict()
    check_checkpoint(
        os.path.join(folder, kwargs.get("subfolder", "")),
        expected,
        shape.quantization_bit,
        shape.tie_word_embeddings,
        model_class.base_model_prefix,
    )


class PrefixEncoder(nn.Module):
    """The learned keys and values of P-Tuning v2.

    With `prefix_projection`, `embedding` is [P, hidden] and `trans` widens it; else it is [P, 2·L·hidden] itself.
    """

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        width = 2 * config.num_layers * config.hidden_size
        if config.prefix_projection:
            self.embedding = nn.Embedding(config.pre_seq_len, config.hidden_size)
            self.trans = nn.Sequential(
                nn.Linear(config.hidden_size, config.hidden_size), nn.Tanh(), nn.Linear(config.hidden_size, width)
            )
        else:
            self.embedding = nn.Embedding(config.pre_seq_len, width)
            self.trans = nn.Identity()
        for module in self.modules():
            module.is_prefix = True  # for `_init_weights`, which sees each module alone

    def forward(self, prefix_tokens: torch.Tensor) -> torch.Tensor:
        """int64 [B, P] → float [B, P, 2·L·hidden]."""
        return self.trans(self.embedding(prefix_tokens))


def load_prefix_encoder(
    path: str | os.PathLike, config: ChatGLMConfig, device: torch.device, dtype: torch.dtype
) -> tuple[PrefixEncoder, dict]:
    """The prefix encoder in a file or folder, and the fields of the configuration that say its shape.

    Raises:
        OSError: no readable file there.
        ValueError: a file without a prefix, or with one of another model's shape.
    """
    state = read_prefix(path)
    found = {"pre_seq_len": len(state["embedding.weight"]), "prefix_projection": "trans.0.weight" in state}
    config = copy.deepcopy(config)
    config.update(found)
    with torch.device("meta"):
        encoder = PrefixEncoder(config).to(dtype)
    encoder.to_empty(device=device)
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"The prefix in {path} was made for a model of another shape: {error}") from None
    return encoder, found
