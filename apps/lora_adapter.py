"""A PEFT folder with LoRA, to be merged."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from .. import checkpoint

LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin")
LORA_NAME = re.compile(r"^(?:base_model\.model\.)?(?:transformer\.)?(.+)\.(lora_[AB])\.weight$")
UNKNOWN_FEATURES = ("fan_in_fan_out", "enable_lora", "layer_replication", "alora_invocation_tokens", "use_qalora")
MATCH_SECONDS = 20
MATCH_ELSEWHERE = "import json, re, sys\njson.dump(_match(*json.load(sys.stdin)), sys.stdout)"


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
        config = _read_config(note)
        if config.get("peft_type") != "LORA":
            raise ValueError(f"{folder} holds {config.get('peft_type')}, not LoRA: only LoRA can be merged.")
        for feature in UNKNOWN_FEATURES:
            if config.get(feature):
                raise ValueError(f"{folder} was made with {feature}, which can't be merged here.")
        tensors = checkpoint.read_tensors(str(paths[0]), "cpu")
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            match = LORA_NAME.match(name)
            if not match:  # DoRA, trained biases, modules_to_save, embeddings
                raise ValueError(f"{paths[0]} holds {name}, which is more than plain LoRA of linears.")
            found.setdefault(match[1], {})[match[2]] = tensor
        keys = _first_matches(list(config["alpha_pattern"]), list(found), note)
        self.pairs = {}
        for name, pair in found.items():
            if pair.keys() != {"lora_A", "lora_B"}:
                raise ValueError(f"{paths[0]} has only {', '.join(pair)} for {name}: it is damaged.")
            rank = len(pair["lora_A"]) if pair["lora_A"].dim() else 0
            if not rank or {tensor.dim() for tensor in pair.values()} != {2}:
                raise ValueError(f"{paths[0]}: the LoRA of {name} is no pair of matrices: it is damaged.")
            alpha = config["alpha_pattern"][keys[name]] if name in keys else config["lora_alpha"]
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


def _read_config(note: Path) -> dict:
    """PEFT's configuration, with a `lora_alpha` and an `alpha_pattern` in any case. Raises OSError if it is damaged."""
    try:
        config = json.loads(note.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OSError(f"{note} is damaged ({error}).") from None
    if not isinstance(config, dict) or not isinstance(config.get("alpha_pattern") or {}, dict):
        raise OSError(f"{note} is damaged: it holds no configuration of PEFT.")
    config["alpha_pattern"] = config.get("alpha_pattern") or {}
    config.setdefault("lora_alpha", 8)  # PEFT's default
    for name, alpha in {**config["alpha_pattern"], "lora_alpha": config["lora_alpha"]}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < sys.float_info.max:
            raise OSError(f"{note} is damaged: the alpha of {name!r} is {str(alpha)[:40]}, expected a finite number.")
    return config


def _first_matches(keys: list[str], names: list[str], note: Path) -> dict[str, str]:
    """For each linear that one of the keys of PEFT's patterns means, the first such key.

    A key is the linear's name, the end of it, or a regular expression. Those may take forever: they are matched in a
    process of their own.
    """
    if all(re.fullmatch(r"[\w.]*", key) for key in keys):
        return _match(keys, names)
    command = [sys.executable, "-I", "-c", f"{inspect.getsource(_match)}\n{MATCH_ELSEWHERE}"]
    try:
        done = subprocess.run(
            command, input=json.dumps([keys, names]), capture_output=True, text=True, timeout=MATCH_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{note}: the regular expressions of alpha_pattern, {keys!r:.200}, take too long.") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        raise ValueError(f"{note}: alpha_pattern has a wrong regular expression in {keys!r:.200}: {reason}")
    return json.loads(done.stdout)


def _match(keys: list[str], names: list[str]) -> dict[str, str]:
    found = {}
    for name in names:
        for key in keys:
            if re.match(rf"(.*\.)?({key})$", f"transformer.{name}"):
                found[name] = key
                break
    return found
