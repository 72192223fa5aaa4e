"""Linear layers on the CPU: compiles the kernels at first use, keeps them on disk, and calls them.

Letters: M rows of an activation, K in_features, N out_features.

The machine's own C compiler makes a library for the machine's own instructions (AMX, AVX512, AVX2, NEON, or plain C),
some seconds once per machine. The library is kept in `$XDG_CACHE_HOME/chatglm_int8` (by default
`~/.cache/chatglm_int8`). Where there is no compiler, `library()` is None and callers compute with PyTorch.

Environment: `CC` names the compiler, `CHATGLM_CPU_KERNEL=0` turns the kernels off.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers.utils import logging

from .kernels_cpu_source import SOURCE

logger = logging.get_logger(__name__)

# -O3 unrolls and vectorises; nothing here needs errno from mathematics or traps.
FLAGS = ("-O3", "-std=gnu11", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
OPENMP = "-fopenmp"
WITHOUT_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
MAX_HALF_ROWS = 32  # more rows are better multiplied by a matrix product over a float copy of the weights

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as the source numbers them
_TIMEOUT = 120  # seconds for a compiler; it takes about five
_NO_MEMORY = 1
_lock = threading.Lock()


class CompileError(RuntimeError):
    """The C compiler failed; the message holds its command and its words."""


class Library:
    """A compiled library.

    Attributes:
        instructions: what it was compiled for: "AMX", "AVX512", "AVX2", "NEON with dot product", "NEON" or "portable C".
        allowed: False if the operating system refuses these instructions.
    """

    def __init__(self, path: str | os.PathLike):
        library = ctypes.CDLL(os.fspath(path))
        pointer, count, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        self._linear = library.chatglm_linear
        self._linear.argtypes = (pointer, count, pointer, count, pointer, count, pointer, count, pointer)
        self._linear.argtypes += (size, size, size, count)
        self._half_linear = library.chatglm_half_linear
        self._half_linear.argtypes = (pointer, count, pointer, count, pointer, size, size, size, count)
        library.chatglm_instructions.restype = ctypes.c_char_p
        self.instructions = library.chatglm_instructions().decode()
        self.allowed = bool(library.chatglm_start())

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        bits: int,
        threads: int | None = None,
    ) -> torch.Tensor:
        """x · (scale · weight)ᵀ + bias.

        Args:
            x: float32, float16 or bfloat16 [M, K].
            weight: int8 [N, K], with 4 bits [N, K/2]; contiguous.
            scale, bias: [N], of these dtypes too; the bias may be None.
            bits: 8 or 4.
            threads: torch's number by default.

        Returns:
            [M, N] of x's dtype. A row with NaN or infinite numbers gives NaN or infinite ones.

        Raises:
            ValueError: shapes, dtypes or places that don't fit.
            MemoryError: no memory for the activations' digits.
        """
        rows, columns = x.shape
        features = weight.shape[0]
        vectors = (scale,) if bias is None else (scale, bias)
        if (
            weight.shape[1] * 8 != columns * bits
            or weight.dtype != torch.int8
            or not weight.is_contiguous()
            or x.dtype not in _DTYPES
            or any(v.shape != (features,) or v.dtype not in _DTYPES or v.device.type != "cpu" for v in vectors)
            or x.device.type != "cpu"
            or weight.device.type != "cpu"
        ):
            got = [f"{t.dtype} {list(t.shape)} on {t.device}" for t in (x, weight, *vectors)]
            raise ValueError(
                f"A kernel for x [M, K], int8 weight [N, K·{bits}/8] (contiguous), scale [N] and bias [N] on the CPU "
                f"got {', '.join(got)}."
            )
        x = x.contiguous()
        scale, bias = (*(v.contiguous() for v in vectors), None)[:2]
        y = torch.empty(rows, features, dtype=x.dtype)
        if y.numel() == 0:
            return y
        failed = self._linear(
            x.data_ptr(),
            _DTYPES[x.dtype],
            weight.data_ptr(),
            bits,
            scale.data_ptr(),
            _DTYPES[scale.dtype],
            None if bias is None else bias.data_ptr(),
            0 if bias is None else _DTYPES[bias.dtype],
            y.data_ptr(),
            rows,
            features,
            columns,
            threads or torch.get_num_threads(),
        )
        if failed == _NO_MEMORY:
            raise MemoryError(f"No memory to multiply an activation [{rows}, {columns}] by a weight [{features}, {columns}].")
        return y

    def half_linear(self, x: torch.Tensor, weight: torch.Tensor, threads: int | None = None) -> torch.Tensor:
        """x · weightᵀ for few rows: x [M, K] float32, float16 or bfloat16, weight [N, K] float16 or bfloat16,
        contiguous → [M, N] of x's dtype, summed in float32.

        Raises:
            ValueError, MemoryError: as `linear`.
        """
        rows, columns = x.shape
        if (
            weight.ndim != 2
            or weight.shape[1] != columns
            or weight.dtype not in (torch.float16, torch.bfloat16)
            or x.dtype not in _DTYPES
            or not weight.is_contiguous()
            or x.device.type != "cpu"
            or weight.device.type != "cpu"
        ):
            got = [f"{t.dtype} {list(t.shape)} on {t.device}" for t in (x, weight)]
            raise ValueError(f"A kernel for x [M, K] and a half weight [N, K] (contiguous) on the CPU got {', '.join(got)}.")
        x = x.contiguous()
        y = torch.empty(rows, weight.shape[0], dtype=x.dtype)
        if y.numel() == 0:
            return y
        failed = self._half_linear(
            x.data_ptr(),
            _DTYPES[x.dtype],
            weight.data_ptr(),
            _DTYPES[weight.dtype],
            y.data_ptr(),
            rows,
            weight.shape[0],
            columns,
            threads or torch.get_num_threads(),
        )
        if failed == _NO_MEMORY:
            raise MemoryError(f"No memory to multiply an activation [{rows}, {columns}].")
        return y


def compiler() -> list[str]:
    """The C compiler's command: `$CC`, or cc, gcc or clang.

    Raises:
        CompileError: there is none.
    """
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    raise CompileError(
        f"there is no C compiler ({' '.join(named) or 'cc, gcc, clang'}): install gcc, for instance, or name one in CC"
    )


def _run(command: list[str], text: str) -> str:
    """Run a compiler on a source text; what it printed."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{shlex.join(command)}: {error}") from None
    if done.returncode:
        raise CompileError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
    return done.stdout


@functools.cache
def cache_folder() -> Path:
    """The folder of compiled libraries: this user's alone, so that nobody else can put a library there.

    `$XDG_CACHE_HOME/chatglm_int8` or `~/.cache/chatglm_int8`; where that can't be written, or is open to others, a
    temporary folder that lives as long as this process.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chatglm_int8"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        ours = os.name == "nt" or (state.st_uid == os.getuid() and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
        if ours:
            with tempfile.TemporaryFile(dir=folder):
                return folder
        reason = "it belongs to or can be written by others"
    except (OSError, RuntimeError) as error:
        reason = str(error)
    temporary = tempfile.TemporaryDirectory(prefix="chatglm_int8-")
    _kept_for_life.append(temporary)
    logger.warning_once(f"Kernels can't be kept on disk ({reason}), so they are compiled again in every process.")
    return Path(temporary.name)


_kept_for_life: list[tempfile.TemporaryDirectory] = []


def build(flags: tuple[str, ...] = (*FLAGS, OPENMP)) -> Path:
    """Compile the source with these flags, unless that was done before; the library's path.

    Raises:
        CompileError: no compiler, or one that fails.
    """
    command = compiler()
    version = _run([*command, "--version"], "")
    macros = _run([*command, *flags, "-dM", "-E", "-x", "c", "-"], "")  # say what -march=native means here
    key = hashlib.sha256("\0".join((SOURCE, *command, *flags, version, macros)).encode()).hexdigest()[:32]
    path = cache_folder() / f"cpu-{key}.so"
    if not path.exists():
        for left in path.parent.glob("*.tmp"):  # by processes that were killed
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink(missing_ok=True)
        handle, unfinished = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
        os.close(handle)
        try:
            _run([*command, *flags, "-x", "c", "-", "-o", unfinished, "-lm"], SOURCE)
            os.replace(unfinished, path)  # whole or not at all, also beside other processes
        finally:
            Path(unfinished).unlink(missing_ok=True)
    return path


@functools.cache
def _load() -> Library | None:
    if os.environ.get("CHATGLM_CPU_KERNEL") == "0":
        return None
    flags = (*FLAGS, OPENMP)
    try:
        try:
            path = build(flags)
        except CompileError as error:
            if "openmp" not in str(error).lower() and "omp.h" not in str(error):
                raise
            logger.warning_once(f"Kernels run in one thread, as the compiler has no OpenMP. {error}")
            flags = FLAGS
            path = build(flags)
        library = Library(path)
        if not library.allowed:
            library = Library(build((*flags, *WITHOUT_AMX)))
        return library
    except (CompileError, OSError, AttributeError) as error:
        logger.warning_once(f"INT8 runs in plain PyTorch, several times slower than with compiled kernels: {error}")
        return None


def library() -> Library | None:
    """The library for this machine, compiled at the first call; None where there can't be one, which is said once."""
    with _lock:
        return _load()
