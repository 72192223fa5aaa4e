"""Say what this machine will run, what will be slower or fail, and what to do about it.

Each line is ok, slower or broken; the last two have a remedy. The text has no user names and no paths of a home, so
that it can go into a bug report. The exit code is 1 if a line is broken.
"""

import argparse
import contextlib
import dataclasses
import errno
import getpass
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from .arguments import EMBEDDED
from .imports import imports

# The oldest version that works and the newest that was tested.
VERSIONS = {
    "torch": ("2.8", "2.15"),
    "transformers": ("5.0", "5.24"),
    "sentencepiece": ("0.2", None),
    "protobuf": ("0", None),
    "accelerate": ("1.1", None),
}
GIGABYTE = 10**9
LEAST_DISK = 10**8  # bytes; the kernels of a machine take less

# What the modules of the kernels say, and what to do about it.
REMEDIES = {
    r"CPU quota": "Set OMP_NUM_THREADS to the quota.",
    r"no C compiler": "Install gcc or clang, or name a compiler in CC.",
    r"OpenMP": "Install the compiler's OpenMP library (Debian: libgomp1; macOS: brew install libomp).",
    rf"{os.strerror(errno.EDQUOT)}|{os.strerror(errno.ENOSPC)}": "Free disk space, or name another folder in "
    "XDG_CACHE_HOME.",
    r"failed to map segment|Operation not permitted|noexec": "The cache lies on a disk mounted noexec: name another "
    "folder in XDG_CACHE_HOME.",
    r"compiled again in every process": "Name a folder in XDG_CACHE_HOME that only you can write.",
    r"cpm_kernels": "pip install cpm_kernels",
    r"nvrtc": "pip install nvidia-cuda-nvrtc",
}


@dataclasses.dataclass
class Finding:
    """A line of the report. state: ok, slower or broken."""

    check: str
    state: str
    text: str
    remedy: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(EMBEDDED), metavar="FOLDER", help="checkpoint folder to check")
    parser.add_argument("--json", action="store_true", help="write JSON instead of lines")


def run(arguments: argparse.Namespace) -> int:
    findings = [_without_names(finding, arguments.model) for finding in examine(arguments.model)]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        for finding in findings:
            print(f"{finding.state:7} {finding.check}: {finding.text}")
            if finding.remedy:
                print(f"        → {finding.remedy}")
    return int(any(finding.state == "broken" for finding in findings))


def examine(folder: str) -> Iterator[Finding]:
    """All findings, for a model folder on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.release()}, {platform.machine()}, {cores} cores"
    yield Finding("system", "ok", f"{system}, Python {platform.python_version()}")
    versions = list(check_versions())
    yield from versions
    if any(finding.state == "broken" for finding in versions):
        return  # the other checks need these packages
    for check in (check_cpu_kernels, check_gpu, lambda: check_folder(folder)):
        try:
            with imports():
                yield from check()
        except Exception as error:  # a report that ends here would help least where it is needed most
            yield Finding(getattr(check, "__name__", "folder"), "broken", f"{type(error).__name__}: {error}")


def check_versions() -> Iterator[Finding]:
    """The packages that everything needs, against the tested range."""
    for name, (oldest, newest) in VERSIONS.items():
        remedy = f'pip install -U "{name}>={oldest}"' if oldest != "0" else f"pip install {name}"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "broken", "not installed", remedy)
            continue
        if _numbers(version) < _numbers(oldest):
            yield Finding(name, "broken", f"{version} is too old: {oldest} or newer is needed", remedy)
        elif newest and _numbers(version)[:2] > _numbers(newest):
            yield Finding(name, "ok", f"{version}, newer than the tested {oldest} to {newest}")
        else:
            yield Finding(name, "ok", version)


def check_cpu_kernels() -> Iterator[Finding]:
    """Compiler, OpenMP, instructions and the folder of compiled kernels."""
    import torch

    from .. import kernel_cache, kernels_cpu

    if os.environ.get("CHATGLM_CPU_KERNEL") == "0":
        yield Finding("CPU kernels", "slower", "turned off by CHATGLM_CPU_KERNEL=0", "Unset CHATGLM_CPU_KERNEL.")
        return
    with _messages(kernel_cache.logger, kernels_cpu.logger) as said:
        library = kernels_cpu.library()
        folder = kernel_cache.cache_folder()
    for text in said:
        yield Finding("CPU kernels", "slower", text, remedy(text))
    if library is not None and not said:
        yield Finding("CPU kernels", "ok", f"{library.instructions}, {torch.get_num_threads()} threads")
    free = shutil.disk_usage(folder).free
    text = f"{free / GIGABYTE:.1f} GB free for compiled kernels"
    if free < LEAST_DISK:
        yield Finding("disk", "slower", text, "Free disk space, or name another folder in XDG_CACHE_HOME.")
    else:
        yield Finding("disk", "ok", text)


def check_gpu() -> Iterator[Finding]:
    """GPU, driver, cpm_kernels and NVRTC."""
    import torch

    from .. import cuda_runtime

    if not torch.cuda.is_available():
        if not cuda_runtime.find_library("cuda"):
            yield Finding("GPU", "ok", "none; models run on the CPU")
        elif torch.version.cuda is None:
            text = f"there is a driver, but PyTorch {torch.__version__} was built without CUDA"
            yield Finding("GPU", "slower", text, "Install PyTorch with CUDA: https://pytorch.org/get-started/locally")
        else:
            text = f"PyTorch for CUDA {torch.version.cuda} finds no GPU"
            yield Finding("GPU", "slower", text, "Update the NVIDIA driver; nvidia-smi has to list the GPU.")
        return
    yield Finding("GPU", "ok", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    if os.environ.get("CHATGLM_CUDA_KERNEL") == "0":
        yield Finding("CUDA kernels", "slower", "turned off by CHATGLM_CUDA_KERNEL=0", "Unset CHATGLM_CUDA_KERNEL.")
        return
    try:
        version = ".".join(map(str, cuda_runtime.load_libraries().nvrtc.nvrtcVersion()))
    except Exception as error:  # of cpm_kernels, which has its own for each library
        text = str(error) or repr(error)
        yield Finding("CUDA kernels", "slower", text, remedy(text))
        return
    found = cuda_runtime.find_library("nvrtc")
    yield Finding("CUDA kernels", "ok", f"NVRTC {version}, {Path(found).name if found else 'of the CUDA toolkit'}")


def check_folder(folder: str) -> Iterator[Finding]:
    """A model folder, and the memory that it needs."""
    from .. import ChatGLMTokenizer
    from .model_folder import inspect_folder

    try:
        config, stored = inspect_folder(Path(folder))
        ChatGLMTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        yield Finding("folder", "broken", str(error), "Correct or download again what the message names.")
        return
    weights = sum(tensor.nbytes for _, tensor in stored.values())
    bits = f"INT{config.quantization_bit}" if config.quantization_bit else "float"
    yield Finding("folder", "ok", f"{bits} weights, {weights / GIGABYTE:.2f} GB")
    yield from check_memory(weights, 4 * config.num_layers * config.hidden_size)


def check_memory(weights: int, token: int) -> Iterator[Finding]:
    """Memory of the CPU and of the GPU against weights and the keys and values of a token in half precision, bytes."""
    import psutil
    import torch

    places = {"memory": psutil.virtual_memory().available}
    if torch.cuda.is_available():
        places["GPU memory"] = torch.cuda.mem_get_info()[0]
    short, long = weights + 512 * token, weights + 2048 * token
    for place, free in places.items():
        text = (
            f"{free / GIGABYTE:.2f} GB free; {short / GIGABYTE:.2f} GB needed with 512 tokens, "
            f"{long / GIGABYTE:.2f} GB with 2048"
        )
        if free >= long:
            yield Finding(place, "ok", text)
        else:
            state = "slower" if free >= short else "broken"
            advice = "Free memory, or use INT4 weights (chatglm quantize --bits 4)."
            yield Finding(place, state, text, advice)


def remedy(text: str) -> str:
    """What to do about a message of the kernels."""
    found = (advice for pattern, advice in REMEDIES.items() if re.search(pattern, text, re.IGNORECASE))
    return next(found, "Correct what the message names; until then PyTorch computes the same.")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.split("+")[0])[:3]))


@contextlib.contextmanager
def _messages(*loggers: logging.Logger) -> Iterator[list[str]]:
    """The warnings that are logged meanwhile; they are not shown."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield said
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagate


def _without_names(finding: Finding, folder: str) -> Finding:
    """A finding in one line, without the paths of the model folder, of Python and of the home, and user names."""
    replaced: dict[str, str] = {os.path.abspath(folder): "MODEL", folder: "MODEL", sys.prefix: "PYTHON"}
    with contextlib.suppress(RuntimeError):
        replaced[str(Path.home())] = "~"
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no name for this user id
        user = None

    def clean(text: str | None) -> str | None:
        if text is None:
            return None
        for name, short in replaced.items():
            if len(name) > 1:
                text = text.replace(name, short)
        if user:
            text = re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\]|\b)", "USER", text)
        return " ".join(text.split())

    return dataclasses.replace(finding, text=clean(finding.text), remedy=clean(finding.remedy))
