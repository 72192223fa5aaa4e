"""Linear layers on the CPU: compiles the kernels at first use, keeps them on disk, and calls them.

Letters: M rows of an activation, K in_features, N out_features.

A C compiler of the machine (see `kernel_cache`) makes a library for the machine's own instructions (AMX, AVX512, AVX2,
NEON, or plain C), some seconds once per machine. The library is kept in `$XDG_CACHE_HOME/chatglm_int8` (by default
`~/.cache/chatglm_int8`). Where no compiler works, `library()` is None and callers compute with PyTorch.

Environment: `CC` names the first compiler to try, `CHATGLM_CPU_KERNEL=0` turns the kernels off.
"""

import ctypes
import functools
import hashlib
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils import logging

from . import kernel_cache
from .kernel_cache import CompileError, CompilerHangsError, compilers, keep, run_compiler
from .kernel_sources import FILES

logger = logging.get_logger(__name__)

SOURCES = {name: text for name, text in FILES.items() if name.startswith("kernels/cpu/")}
MAIN = "kernels/cpu/kernels.c"  # includes the others

# -O3 unrolls and vectorises; nothing here needs errno from mathematics or traps.
FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-march=native")
OPENMP = "-fopenmp"
MACHINE = ("-march=native", "-mcpu=native", None)  # clang on ARM and gcc on POWER and RISC-V lack the first
# GCC takes vectors on the stack for aligned, which Windows aligns to 16 bytes (GCC's bug 54412).
UNALIGNED_MOVES = "-Wa,-muse-unaligned-vector-move"  # binutils 2.38
WITHOUT_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
HEAD_DIMS = range(16, 257, 16)  # that the kernels of attention can do
MAX_HALF_ROWS = 32  # more rows are better multiplied by a matrix product over a float copy of the weights

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as the source numbers them
_NO_MEMORY = 1
_lock = threading.Lock()


class Library:
    """A compiled library.

    Attributes:
        instructions: what it is for: "AMX", "AVX512 with VNNI", "AVX512", "AVX2 with VNNI", "AVX2",
            "NEON with dot product", "NEON" or "portable C".
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
        self._attention = library.chatglm_attention
        self._attention.argtypes = (pointer, size, size, size) * 3
        self._attention.argtypes += (pointer, size, size, pointer, count, ctypes.c_float, *(size,) * 5, count)
        self._rotary = library.chatglm_rotary
        self._rotary.argtypes = (pointer, pointer, pointer, count, size, size, size, size, count)
        self._rotary.restype = None
        self._gelu = library.chatglm_gelu
        self._gelu.argtypes = (pointer, count, size, count)
        self._gelu.restype = None
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
            threads: torch's number by default, within the CPU quota.

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
        y = torch.empty(rows, features, dtype=x.dtype, device=x.device)
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
            threads or _thread_count(),
        )
        if failed == _NO_MEMORY:
            raise MemoryError(
                f"No memory to multiply an activation [{rows}, {columns}] by a weight [{features}, {columns}]."
            )
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
            raise ValueError(
                f"A kernel for x [M, K] and a half weight [N, K] (contiguous) on the CPU got {', '.join(got)}."
            )
        x = x.contiguous()
        y = torch.empty(rows, weight.shape[0], dtype=x.dtype, device=x.device)
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
            threads or _thread_count(),
        )
        if failed == _NO_MEMORY:
            raise MemoryError(f"No memory to multiply an activation [{rows}, {columns}].")
        return y

    @staticmethod
    def can_attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> bool:
        """Whether `attention` takes these."""
        batch, heads, queries, width = query.shape
        length = key.shape[2]
        tensors = (query, key, value) if mask is None else (query, key, value, mask)
        return (
            width in HEAD_DIMS
            and key.shape == value.shape == (batch, heads, length, width)
            and (mask is None or mask.shape in ((batch, 1, queries, length), (1, 1, queries, length)))
            and query.dtype in _DTYPES
            and all(t.dtype == query.dtype and t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)
        )

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        threads: int | None = None,
    ) -> torch.Tensor:
        """softmax(scaling · query · keyᵀ + mask) · value, summed in float32.

        Args:
            query: [B, H, S, D] float32, float16 or bfloat16, D a multiple of 16, 256 at most.
            key, value: [B, H, T, D] of the same dtype.
            mask: [B or 1, 1, S, T] of the same dtype, or None.

        Returns:
            [B, S, H, D] of this dtype, contiguous.

        Raises:
            ValueError, MemoryError: as `linear`.
        """
        tensors = (query, key, value) if mask is None else (query, key, value, mask)
        if not self.can_attend(*tensors):
            got = [f"{t.dtype} {list(t.shape)} on {t.device}" for t in tensors]
            raise ValueError(
                "A kernel for query [B, H, S, D], key and value [B, H, T, D] and mask [B, 1, S, T] of one dtype on the "
                f"CPU, D a multiple of 16 and 256 at most, the last dimension contiguous, got {', '.join(got)}."
            )
        batch, heads, queries, width = query.shape
        length = key.shape[2]
        context = torch.empty(batch, queries, heads, width, dtype=query.dtype, device=query.device)
        failed = self._attention(
            query.data_ptr(),
            *query.stride()[:3],
            key.data_ptr(),
            *key.stride()[:3],
            value.data_ptr(),
            *value.stride()[:3],
            None if mask is None else mask.data_ptr(),
            0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
            0 if mask is None else mask.stride(2),
            context.data_ptr(),
            _DTYPES[query.dtype],
            scaling,
            batch,
            heads,
            queries,
            length,
            width,
            threads or _thread_count(),
        )
        if failed == _NO_MEMORY:
            raise MemoryError(f"No memory for the scores of {length} keys.")
        return context

    @staticmethod
    def can_rotate(qkv: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> bool:
        """Whether `rotary_` takes these."""
        *rows, _, triple = qkv.shape
        parts, width = cosine.shape[-2], triple // 3
        return (
            cosine.shape == sine.shape == (*rows, 1, parts, width // parts)
            and width <= HEAD_DIMS[-1]
            and width % (2 * parts) == 0
            and qkv.dtype in _DTYPES
            and all(t.dtype == qkv.dtype and t.device.type == "cpu" and t.is_contiguous() for t in (qkv, cosine, sine))
        )

    def rotary_(
        self, qkv: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, threads: int | None = None
    ) -> torch.Tensor:
        """Turn queries and keys in place, as `apply_rotary` does.

        Args:
            qkv: [B, S, H, 3·D] float32, float16 or bfloat16, contiguous: a query, a key and a value a head; D is 256 at
                most.
            cosine, sine: [B, S, 1, R, D/R] of the same dtype.

        Raises:
            ValueError: other tensors.
        """
        if not self.can_rotate(qkv, cosine, sine):
            got = [f"{t.dtype} {list(t.shape)} on {t.device}" for t in (qkv, cosine, sine)]
            raise ValueError(
                "A kernel for qkv [B, S, H, 3·D], cosine and sine [B, S, 1, R, D/R] of one dtype on the CPU, all "
                f"contiguous, D even in each part and 256 at most, got {', '.join(got)}."
            )
        *rows, heads, triple = qkv.shape
        self._rotary(
            qkv.data_ptr(),
            cosine.data_ptr(),
            sine.data_ptr(),
            _DTYPES[qkv.dtype],
            math.prod(rows),
            heads,
            triple // 3,
            cosine.shape[-2],
            threads or _thread_count(),
        )
        return qkv

    def gelu_(self, x: torch.Tensor, threads: int | None = None) -> torch.Tensor:
        """GELU in its tanh form, in place; x float32, float16 or bfloat16, contiguous, on the CPU.

        Raises:
            ValueError: another tensor.
        """
        if x.dtype not in _DTYPES or x.device.type != "cpu" or not x.is_contiguous():
            raise ValueError(f"Expected a contiguous float tensor on the CPU, got {x.dtype} on {x.device}.")
        self._gelu(x.data_ptr(), _DTYPES[x.dtype], x.numel(), threads or _thread_count())
        return x


def cpu_quota(root: Path = Path("/")) -> int | None:
    """CPUs, rounded up, that the quota of this process's control group (cgroup v1 or v2) allows; None without one."""
    found = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            continue
        for mount in (controllers, "", "unified"):
            group = root / "sys/fs/cgroup" / mount
            for part in (".", *Path(path.lstrip("/")).parts):  # a limit of an outer group holds, too
                group = group / part
                for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
                    try:
                        quota, period = " ".join((group / file).read_text() for file in files).split()
                    except (OSError, ValueError):
                        continue
                    if quota not in ("max", "-1"):
                        found.append(math.ceil(int(quota) / int(period)))
    return max(1, min(found)) if found else None


_quota = functools.cache(cpu_quota)


def _thread_count() -> int:
    return min(torch.get_num_threads(), _quota() or torch.get_num_threads())


def _machine_macros(command: list[str]) -> str:
    """The compiler's predefined macros, which say what -march=native means here."""
    return run_compiler([*command, "-dM", "-E", "-x", "c", "-"])


def _compile(command: list[str], path: Path) -> None:
    """Compile the sources, in a temporary folder, to `path`. (Compilers for Windows leave files beside a library.)"""
    with tempfile.TemporaryDirectory(prefix="chatglm_int8-") as folder:
        for name, text in SOURCES.items():
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8", newline="\n")
        try:
            run_compiler([*command, f"{folder}/{MAIN}", "-o", f"{folder}/library.so", "-lm"])
        except CompileError as error:  # the files are named as in the repository
            raise type(error)(str(error).replace(f"{folder}/", "")) from None
        shutil.copyfile(f"{folder}/library.so", path)


def build(flags: tuple[str, ...] = (*FLAGS, OPENMP), compiler: list[str] | None = None) -> Path:
    """Compile the sources with these flags, unless that was done before; the library's path.

    Args:
        compiler: a command, by default the first of `compilers()`.

    Raises:
        CompileError: no compiler, or one that fails.
    """
    compiler = compiler or compilers()[0]
    command = [*compiler, *flags]
    version = run_compiler([*compiler, "--version"])
    parts = (*SOURCES, *SOURCES.values(), *command, version, _machine_macros(command))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    return keep(f"cpu-{key}.so", lambda path: _compile(command, path))


def flag_sets(compiler: list[str]) -> Iterator[tuple[str, ...]]:
    """Flags to try in turn: for this machine's instructions, then for any machine; with OpenMP, then without.

    Raises:
        CompileError: the compiler does not work at all.
    """
    clang = "__clang__" in _machine_macros(compiler)
    flags = [flag for flag in FLAGS if flag not in MACHINE]
    if kernel_cache.WINDOWS:
        flags.remove("-fPIC")
        if not clang:
            flags.append("-static")  # libgomp-1.dll is not found beside a compiler
            if kernel_cache.assembles([*compiler, UNALIGNED_MOVES]):
                flags.append(UNALIGNED_MOVES)
    for machine in MACHINE:
        chosen = (*flags, *([machine] if machine else []))
        try:
            _machine_macros([*compiler, *chosen])
        except CompileError:
            if machine:
                continue
            raise
        yield (*chosen, *openmp_flags(clang))
        yield chosen


def openmp_flags(clang: bool) -> tuple[str, ...]:
    """Flags for OpenMP. Clang takes the runtime that PyTorch has loaded: two that are clang's end the process."""
    runtime = kernel_cache.openmp_runtime()
    if not clang or runtime is None:
        return (OPENMP,)
    if "gomp" in runtime.name:
        return ("-Xclang", OPENMP, "-DOPENMP_OVER_GOMP")
    if kernel_cache.WINDOWS:
        return ("-Xclang", OPENMP, str(runtime))
    return ("-Xclang", OPENMP, *(["-Wl,-undefined,dynamic_lookup"] if kernel_cache.MACOS else []))


def _open(flags: tuple[str, ...], compiler: list[str]) -> Library:
    """The library, built unless it is on disk, loaded from there or, where a folder forbids that, from a copy."""
    runtime = kernel_cache.openmp_runtime() if "-Xclang" in flags else None
    if runtime:  # so that the library sees its functions
        ctypes.CDLL(os.fspath(runtime), mode=ctypes.RTLD_GLOBAL)
    path = build(flags, compiler)
    for again in (True, False):
        try:
            return Library(path)
        except OSError:
            try:
                return Library(kernel_cache.temporary_copy(path))
            except OSError:
                if not again:
                    raise
        path.unlink(missing_ok=True)  # what is on disk is broken
        path = build(flags, compiler)


def _try(compiler: list[str]) -> Library:
    """The library by this compiler, with the first flags that work. Raises the first failure if none do."""
    first, threaded = None, None
    for flags in flag_sets(compiler):
        try:
            library = _open(flags, compiler)
            if not library.allowed:
                library = _open((*flags, *WITHOUT_AMX), compiler)
        except CompilerHangsError:
            raise
        except (CompileError, OSError, AttributeError) as error:
            first = first or error
            threaded = error if OPENMP in flags else threaded
            continue
        if OPENMP not in flags:
            logger.warning_once(f"Kernels run in one thread, as they don't compile with OpenMP: {threaded}")
        return library
    raise first


@functools.cache
def _load() -> Library | None:
    if os.environ.get("CHATGLM_CPU_KERNEL") == "0":
        return None
    failures = []
    try:
        for compiler in compilers():
            try:
                library = _try(compiler)
            except (CompileError, OSError, AttributeError) as error:
                failures.append(str(error))
                continue
            if failures:
                logger.warning_once(f"{' '.join(compiler)} compiled the kernels, after this: {failures[0]}")
            _warn_of_quota()
            return library
    except CompileError as error:
        failures.append(str(error))
    logger.warning_once(
        "INT8 runs in plain PyTorch, 20 to 50 times slower for one row than with compiled kernels. "
        f"To get a C compiler: {kernel_cache.install_hint()}. What was tried: " + "\n".join(failures)
    )
    return None


def _warn_of_quota() -> None:
    quota, threads = _quota(), torch.get_num_threads()
    if quota and quota < threads:
        logger.warning_once(
            f"A CPU quota allows {quota} of PyTorch's {threads} threads at a time, and more make it slower: "
            f"set OMP_NUM_THREADS={quota} or call torch.set_num_threads({quota})."
        )


def library() -> Library | None:
    """The library for this machine, compiled at the first call; None where there can't be one, which is said once."""
    with _lock:
        return _load()
