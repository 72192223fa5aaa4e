"""INT8 and INT4 products, and the small operations of a decoding step, on NVIDIA GPUs.

The CUDA C++ of `kernels/cuda` is compiled by NVRTC at the first call, through the binding of cpm_kernels, loaded by its
`LazyKernelCModule` and launched by its `KernelFunction`. Compiled modules are kept on disk (see `kernel_cache`).

Letters: M rows of an activation, K in_features, N out_features, B batch, H heads, D head width, T places in a cache.

Activations are float16 or bfloat16, sums are float32. Needs compute capability 7.0, for bfloat16 8.0. Without
cpm_kernels, NVRTC or a driver, `available` says why, once, and the caller goes on in PyTorch.
"""

import ctypes
import functools
import glob
import hashlib
import importlib
import importlib.util
import itertools
import os
import re
import struct
import sys
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch

from .kernel_cache import keep
from .kernel_sources import FILES

_REMEDY = (
    "Install what is missing (pip install cpm_kernels; NVRTC comes with PyTorch's CUDA wheels or the CUDA toolkit), or "
    "go on without: PyTorch computes the same, more slowly."
)
# Activations of up to so many rows are multiplied by the tensor core kernels; beyond, expanding the weight and leaving
# the product to cuBLAS is faster.
_MOST_ROWS = 128
MOST_FEW_ROWS = 32  # Hopper has one kernel for them, and another for more
_SHARED_LIMIT = 32 * 1024  # of a kernel that has not asked for more; it has up to 16 KB beside
HEAD_DIMS = (16, 32, 64, 128)
MAX_PARTS = 8  # into which the keys of a head are cut
# linear_tiles, by (bits, TILE_M): HEIGHT, STAGES, BLOCKS_PER_SM.
TILE_SHAPES = {
    (8, 8): (1, 4, 4),
    (8, 16): (2, 3, 3),
    (8, 32): (2, 4, 2),
    (8, 64): (2, 3, 2),
    (4, 8): (1, 4, 4),
    (4, 16): (1, 3, 4),
    (4, 32): (2, 2, 3),
    (4, 64): (2, 2, 2),
}
M16_TILES = (8, 16)  # linear_m16: TILE_M
LARGE_M_STAGES = {64: 8, 128: 8, 192: 6, 256: 5}  # hopper/linear_large_m: STAGES by TILE_M
LARGE_M_SPLITS = (1, 2)
SMALL_M_TILES = (8, 16, 32)  # hopper/linear_small_m: TILE_M
SMALL_M_SPLITS = (1, 2, 3)  # clusters of four leave many multiprocessors idle
MAX_STAGES = 10  # hopper/linear_small_m: a launch says how many it uses
_lock = threading.RLock()
_local = threading.local()


# --- Finding and loading the libraries ---


def find_library(name: str) -> str | None:
    """Path of a CUDA library, or its bare name where the loader knows it.

    Args:
        name: "cuda" (the driver), "cudart" or "nvrtc".

    Looks where PyTorch's own wheels put their libraries, in the folders of the namespace package `nvidia` and in
    `torch/lib`. The library of PyTorch's CUDA version is preferred, then the newest. None if there is none: cpm_kernels
    then looks in `CUDA_PATH`, /usr/local/cuda and the linker's cache.
    """
    if name == "cuda":
        driver = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            ctypes.CDLL(driver)  # on a machine with a GPU, PyTorch has loaded it already
        except OSError:
            return None
        return driver
    folders = []
    nvidia = importlib.util.find_spec("nvidia")
    for folder in nvidia.submodule_search_locations or () if nvidia else ():
        folders += glob.glob(os.path.join(folder, "*", "lib")) + glob.glob(os.path.join(folder, "*", "bin"))
    folders.append(os.path.join(os.path.dirname(torch.__file__), "lib"))
    pattern = re.compile(rf"lib{name}(?:-[0-9a-f]+)?\.so\.(\d+)[\d.]*|{name}(?:64)?_(\d+)[\d_]*\.dll")
    preferred = int((torch.version.cuda or "0").split(".")[0])
    found = []
    for folder in folders:
        for file in os.listdir(folder) if os.path.isdir(folder) else ():
            match = pattern.fullmatch(file)
            if match:
                major = int((match[1] or match[2])[:2])
                found.append((major == preferred, major, os.path.join(folder, file)))
    return max(found)[2] if found else None


_PRIVATE = f"{__name__}_cpm_kernels"


@functools.cache
def load_libraries() -> types.ModuleType:
    """The bindings of cpm_kernels: `nvrtc`, `cuda` (the driver), `cudart`. They load on machines without a GPU, too.

    cpm_kernels opens its libraries where it is imported, knows nothing of PyTorch's wheels and wants `pkg_resources`
    for kernels of its own. So the modules that are needed are loaded as a private copy, under other names, whose
    search begins with `find_library`. What the user imports as cpm_kernels is not touched, and neither is the
    environment.

    Raises:
        Exception: cpm_kernels is not installed, or can't be loaded.
    """
    spec = importlib.util.find_spec("cpm_kernels")
    if spec is None:
        raise ImportError("cpm_kernels is not installed")

    def hollow(name: str, *path: str) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__path__ = [os.path.join(folder, *path) for folder in spec.submodule_search_locations]
        sys.modules[name] = module
        return module

    hollow(_PRIVATE)
    hollow(f"{_PRIVATE}.kernels", "kernels")
    library = hollow(f"{_PRIVATE}.library", "library")
    lib = importlib.import_module(f"{_PRIVATE}.library.base")
    for search in ("unix_find_lib", "windows_find_lib"):
        theirs = getattr(lib, search)
        setattr(lib, search, lambda name, theirs=theirs: find_library(name) or theirs(name))
    lib.logger.disabled = True  # it lists symbols that newer CUDA versions dropped; those needed raise by themselves
    for name in ("cuda", "cudart", "nvrtc", "cublaslt"):
        setattr(library, name, importlib.import_module(f"{_PRIVATE}.library.{name}"))
    library.cublaslt.cublasLtCreate = lambda: None  # cpm_kernels makes a handle for every device; not needed here
    return library


@functools.cache
def load_launcher() -> types.ModuleType:
    """`cpm_kernels.kernels.base`: `LazyKernelCModule` and `KernelFunction`. Needs a GPU; raises as `load_libraries`."""
    load_libraries()
    stand_in = "pkg_resources" not in sys.modules
    if stand_in:
        sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
    try:
        return importlib.import_module(f"{_PRIVATE}.kernels.base")
    finally:
        if stand_in:
            del sys.modules["pkg_resources"]


# --- Compiling, with a cache on disk ---


def _modules() -> dict[str, tuple[str, dict[str, int]]]:
    """Of every module, its file in `kernels/cuda` and the constants that it is compiled with.

    Each holds one kernel of one shape, where a model needs few of them.
    """
    modules = {"prompt": ("prompt", {}), "training": ("training_norm", {})}
    modules |= {f"step_{dim}": ("decode_attention", {"HEAD_DIM": dim, "MAX_PARTS": MAX_PARTS}) for dim in HEAD_DIMS}
    modules |= {f"linear_m1_{bits}": ("linear_m1", {"BITS": bits}) for bits in (8, 4, 16)}
    modules |= {f"linear_m8_{bits}": ("linear_m8", {"BITS": bits}) for bits in (8, 4)}
    for bits, tile_m in itertools.product((8, 4), M16_TILES):
        modules[f"linear_m16_{bits}_{tile_m}"] = "linear_m16", {"BITS": bits, "TILE_M": tile_m}
    for (bits, tile_m), shape in TILE_SHAPES.items():
        constants = dict(zip(("HEIGHT", "STAGES", "BLOCKS_PER_SM"), shape, strict=True))
        modules[f"linear_tiles_{bits}_{tile_m}"] = "linear_tiles", {"BITS": bits, "TILE_M": tile_m, **constants}
    for tile_m, split, bits in itertools.product(SMALL_M_TILES, SMALL_M_SPLITS, (8, 4)):
        constants = {"BITS": bits, "TILE_M": tile_m, "SPLIT_K": split, "MAX_STAGES": MAX_STAGES}
        modules[f"linear_small_m_{bits}_{tile_m}_{split}"] = "hopper/linear_small_m", constants
    for (tile_m, stages), split in itertools.product(LARGE_M_STAGES.items(), LARGE_M_SPLITS):
        constants = {"TILE_M": tile_m, "SPLIT_K": split, "STAGES": stages}
        for name, bits, transposed in (
            ("linear_large_m_8", 8, 0),
            ("linear_large_m_4", 4, 0),
            ("input_gradient", 8, 1),
        ):
            kernel = {"BITS": bits, "TRANSPOSED": transposed}
            modules[f"{name}_{tile_m}_{split}"] = "hopper/linear_large_m", {**kernel, **constants}
    return modules


MODULES = _modules()


def compile_module(nvrtc, name: str, options: list[str]) -> bytes:
    """Compile a module to machine code (a cubin), or to PTX where `options` name a virtual architecture.

    Args:
        nvrtc: the binding, `cpm_kernels.library.nvrtc`.

    Raises:
        RuntimeError: what the compiler said.
    """
    file = f"kernels/cuda/{MODULES[name][0]}.cuh"
    headers = {name: text for name, text in FILES.items() if name.startswith("kernels/cuda/")}
    program = nvrtc.nvrtcProgram()
    nvrtc.nvrtcCreateProgram(program, FILES[file], file, len(headers), list(headers.values()), list(headers))
    try:
        nvrtc.nvrtcCompileProgram(program, len(options), options)
        kind = "PTX" if any("=compute_" in option for option in options) else "CUBIN"
        code = ctypes.create_string_buffer(getattr(nvrtc, f"nvrtcGet{kind}Size")(program))
        getattr(nvrtc, f"nvrtcGet{kind}")(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def compiler_options(name: str, bf16: bool, architecture: int) -> list[str]:
    """How a module is compiled. sm_90a has instructions that are Hopper's alone."""
    file, constants = MODULES[name]
    special = "a" if file.startswith("hopper/") else ""
    defined = [f"-D{key}={value}" for key, value in {"BF16": int(bf16), **constants}.items()]
    return ["--std=c++17", f"--gpu-architecture=sm_{architecture}{special}", *defined]


def _module_code(nvrtc, name: str, bf16: bool, architecture: int) -> bytes:
    """Compiled code of a module, from the cache on disk if it is there."""
    options = compiler_options(name, bf16, architecture)
    key = repr((name, FILES, options, nvrtc.version))
    file = f"cuda-{name}-sm_{architecture}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"
    return keep(file, lambda path: path.write_bytes(compile_module(nvrtc, name, options))).read_bytes()


@functools.cache
def _module(name: str, bf16: bool, architecture: int):
    """A `LazyKernelCModule`, compiled if it is not in the cache."""
    return load_launcher().LazyKernelCModule(_module_code(load_libraries().nvrtc, name, bf16, architecture))


def _compile(names: list[str], bf16: bool, architecture: int) -> None:
    """Compile the modules that are in no cache, side by side."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: _module(name, bf16, architecture), names))


@functools.cache
def _function(name: str, module: str, bf16: bool, device: int, much_shared: bool):
    """A `KernelFunction` for one device, the current one; `much_shared`: of more shared memory than is had unasked."""
    architecture, *_ = _properties(device)
    if MODULES[module][0].startswith("hopper/"):  # a model that needs it will need those with other splits of K
        family = module.rpartition("_")[0]
        _compile([other for other in MODULES if other.rpartition("_")[0] == family], bf16, architecture)
    function = load_launcher().KernelFunction(_module(module, bf16, architecture), name)
    prepare, handle = function._prepare_func, function._prepare_func()

    def prepare_once() -> ctypes.c_void_p:
        # Making the device's context current takes as long as a launch, so each thread does it once.
        ready = _local.__dict__.setdefault("ready", set())
        if device not in ready:
            ready.add(device)
            prepare()
        return handle

    function._prepare_func = prepare_once
    if much_shared:
        _allow_shared(function, device)
    return function


def _allow_shared(function, device: int) -> None:
    """Let a kernel have as much dynamic shared memory as there is on `device`, the current one."""
    cuda = load_libraries().cuda
    handle, static = function._prepare_func(), ctypes.c_int()
    read, write = cuda.cuda._Lib__lib.cuFuncGetAttribute, cuda.cuda._Lib__lib.cuFuncSetAttribute
    cuda.checkCUStatus(read(ctypes.byref(static), 1, handle))  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
    *_, most = _properties(device)
    cuda.checkCUStatus(write(handle, 8, most - static.value))  # ..._MAX_DYNAMIC_SHARED_SIZE_BYTES


@functools.cache
def _properties(device: int) -> tuple[int, int, int, int]:
    """Compute capability (90 = 9.0), number of multiprocessors, and bytes of shared memory of each and for a block."""
    properties = torch.cuda.get_device_properties(device)
    shared, most = properties.shared_memory_per_multiprocessor, properties.shared_memory_per_block_optin
    return properties.major * 10 + properties.minor, properties.multi_processor_count, shared, most


_availability: dict[tuple[int, torch.dtype], bool] = {}


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on this device with activations of this dtype. The first call compiles or loads them.

    Where they should run and can't, a warning says why and what to do, once. CHATGLM_CUDA_KERNEL=0 in the environment
    turns them off.
    """
    known = _availability.get((device.index, dtype)) if device.type == "cuda" else False
    if known is None:
        if torch.version.hip or dtype not in (torch.float16, torch.bfloat16):
            return False
        if torch.cuda.is_current_stream_capturing():
            return False  # modules can't be loaded now
        index = device.index if device.index is not None else torch.cuda.current_device()
        with _lock:
            known = _availability.get((index, dtype))
            if known is None:
                known = _availability[index, dtype] = _try_to_load(index, dtype)
    return known


def _try_to_load(device: int, dtype: torch.dtype) -> bool:
    architecture, *_ = _properties(device)
    bf16 = dtype == torch.bfloat16
    turned_off = os.environ.get("CHATGLM_CUDA_KERNEL") == "0"
    if turned_off or architecture < (80 if bf16 else 70):
        return False
    try:
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()
            load_launcher()
            needed = ["linear_m1_8", "linear_m1_16", "prompt", "step_128"]
            _compile(needed, bf16, architecture)
            for name in needed:
                _module(name, bf16, architecture).get_module()  # can't be done while a graph is captured
    except Exception as error:
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        warnings.warn(f"The CUDA kernels of chatglm_int8 can't be used: {reason}. {_REMEDY}", stacklevel=2)
        return False
    return True


# --- Launching ---


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("sizes", ctypes.c_uint * 7),  # of the grid, of the block, of dynamic shared memory in bytes
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("count", ctypes.c_uint),
    )


_DEPENDENT = _LaunchAttribute(6, 0, 1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, allowed


_MOST_ARGUMENTS = 16
_CALL = struct.Struct("<128s128sQQQQfiiiiii4x")  # `Call` in kernels/cuda/hopper/call.cuh; its size is a multiple of 64


class _Arguments(threading.local):
    """Where a thread puts the arguments of its next launch, which copies them: eight bytes each."""

    def __init__(self):
        self.memory = ctypes.create_string_buffer(8 * _MOST_ARGUMENTS)
        self.places = [ctypes.c_uint64.from_buffer(self.memory, 8 * i) for i in range(_MOST_ARGUMENTS)]
        self.call = ctypes.create_string_buffer(_CALL.size)


_arguments = _Arguments()


@functools.cache
def _layout(kinds: str) -> struct.Struct:
    return struct.Struct("<" + "".join({"P": "Q", "i": "i4x", "f": "f4x"}[kind] for kind in kinds))


def _pack(kinds: str, *values) -> list:
    """Arguments as `_launch` takes them: P, a pointer to a tensor or None; i, an int; f, a float."""
    numbers = [
        0 if value is None else value.data_ptr() if kind == "P" else value
        for kind, value in zip(kinds, values, strict=True)
    ]
    _layout(kinds).pack_into(_arguments.memory, 0, *numbers)
    return _arguments.places[: len(kinds)]


def _launch(like: torch.Tensor, module: str, name: str, grid: tuple, block: int, shared: int, arguments: list) -> None:
    """Launch a kernel on the device of `like`, whose dtype it takes, and on PyTorch's current stream there."""
    index = like.get_device()
    if torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):
            return _launch(like, module, name, grid, block, shared, arguments)
    function = _function(name, module, like.dtype == torch.bfloat16, index, shared > _SHARED_LIMIT)
    stream = torch._C._cuda_getCurrentRawStream(index)
    if torch.cuda.is_current_stream_capturing() and _properties(index)[0] >= 90:
        # cpm_kernels has no launch with attributes. In a graph the next kernel may begin before this one has ended.
        cuda = load_libraries().cuda
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        config = _LaunchConfig((*grid, block, 1, 1, shared), stream, ctypes.pointer(_DEPENDENT), 1)
        launch = cuda.cuda._Lib__lib.cuLaunchKernelEx
        cuda.checkCUStatus(launch(ctypes.byref(config), function._prepare_func(), pointers, None))
    else:
        function(grid, (block, 1, 1), shared, stream, arguments)
    return None


_tickets: dict[tuple[int, int], torch.Tensor] = {}
_TICKETS = 1 << 16


class own_tickets:
    """A context in which this thread's launches count their blocks in the given int32 zeros [65536], as a graph must
    that may run beside others."""

    def __init__(self, tickets: torch.Tensor):
        self.tickets = tickets

    def __enter__(self) -> None:
        self.before, _local.tickets = getattr(_local, "tickets", None), self.tickets

    def __exit__(self, *error) -> None:
        _local.tickets = self.before


def new_tickets(device: torch.device) -> torch.Tensor:
    """Zeros in which blocks of a launch count themselves; each launch leaves zeros behind."""
    return torch.zeros(_TICKETS, dtype=torch.int32, device=device)


def _get_tickets(device: torch.device) -> torch.Tensor:
    own = getattr(_local, "tickets", None)
    if own is not None and own.device == device:
        return own
    if torch.cuda.is_current_stream_capturing():
        return new_tickets(device)  # somebody else's graph: zeroed at each replay
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)  # launches of a stream follow each other
    if key not in _tickets:
        _tickets[key] = new_tickets(device)
    return _tickets[key]


# --- Operations on one token ---


class Operation(ctypes.Structure):
    """An operation on one token, as the kernels take it; see the struct of this name in kernels/cuda/operation.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "output", "weight", "scale", "bias", "residual")),
        *((name, ctypes.c_void_p) for name in ("norm_weight", "norm_bias", "normed", "cosines", "sines")),
        *((name, ctypes.c_void_p) for name in ("frequencies", "positions", "advance", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("slots", "padding", "parts", "tickets")),
        *((name, ctypes.c_int) for name in ("bits", "N", "K", "gelu", "H", "T", "R", "prefix", "most")),
        *((name, ctypes.c_float) for name in ("alpha", "epsilon")),
    ]


def _operate(like: torch.Tensor, module: str, name: str, grid: tuple, shared: int, **fields) -> None:
    """Launch the kernel of an operation, for whose fields tensors may stand."""
    values = {key: v.data_ptr() if isinstance(v, torch.Tensor) else v for key, v in fields.items()}
    _launch(like, module, name, grid, 256, shared, [Operation(**values)])


# --- Products ---


def expand(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The float weight q · scale [N, K], of the scales' dtype, of int8 [N, K] (INT4: [N, K/2]) and scales [N]."""
    n, k = weight.shape[0], weight.shape[1] * 8 // bits
    out = torch.empty(n, k, dtype=scale.dtype, device=weight.device)
    threads = -(-k // 8)
    block = min(256, -(-threads // 32) * 32)
    grid = (-(-threads // block), min(-(-n // 4) if k % 8 == 0 else n, 65535), 1)
    _launch(out, "prompt", f"expand_{bits}", grid, block, 0, _pack("PPPii", weight, scale, out, n, k))
    return out


@functools.lru_cache(maxsize=4096)
def _plan(m: int, n: int, k: int, bits: int, device: int) -> tuple | None:
    """How M rows are multiplied: (module, kernel, grid, threads, shared bytes, floats of partial sums).

    The last is None where the kernel needs no memory for them. None instead of all: expand the weight.
    """
    architecture, processors, shared_of_all, shared_of_one = _properties(device)
    if k * bits % 128 or k % 8 or m > (_MOST_ROWS if architecture >= 75 else 8):
        return None
    height = 2 if bits == 4 and m > 1 else 1
    ring = 4 if architecture >= 80 else 2  # the source's RING
    turn = ring * 4096 // (bits * height)  # weights of a row that a block has under way
    padded = -(-k // turn) * turn
    if m == 1:
        shared = ring * 8192 + padded * 2
        resident = max(1, min(2, shared_of_all // (shared + 4096)))
        grid = (min(-(-n // 16), processors * resident), 1, 1)
        plan = f"linear_m1_{bits}", "linear_m1", grid, 256, shared, None
        return plan if shared + 4096 <= shared_of_one else None
    width = next(width for width in (8, 16, 32, 64) if m <= width or width == 64)
    shared = 65536 + width * 2560
    if width in M16_TILES and k <= 4096 and bits < 16 and architecture >= 80 and shared <= shared_of_one:
        return f"linear_m16_{bits}_{width}", "linear_m16", (min(-(-n // 16), processors), 1, 1), 512, shared, None
    shared = m * (padded + 8) * 2
    if m <= 8 and bits < 16 and shared <= shared_of_all // 2 - 12 * 1024:
        grid = (min(-(-n // (16 * height)), processors * 2), 1, 1)
        return f"linear_m8_{bits}", "linear_m8", grid, 256, shared, None
    if bits == 16:
        return None
    # Where the widest tiles don't fit into shared memory, several narrower ones read the weights as often.
    for width in (each for each in (64, 32, 16, 8) if each <= width):
        height, stages, resident = TILE_SHAPES[bits, width]
        shared = max(stages * (height * 8192 + width * (1024 // bits + 8) * 2), height * width * 256)
        if shared + 64 <= shared_of_one:
            break
    rows, columns = -(-n // (64 * height)), -(-m // width)
    if shared + 64 > shared_of_one or columns > 4:
        return None
    steps = -(-k * bits // 1024)
    parts = max(1, min(processors * resident // (rows * columns), steps // 4))
    if rows * columns > _TICKETS:
        parts = 1
    sums = rows * columns * parts * height * width * 64 if parts > 1 else 0
    return f"linear_tiles_{bits}_{width}", "linear_tiles", (rows, parts, columns), 128, shared, sums


# --- Products of many rows on Hopper ---

# Of a tile, in µs on an H200: a step of 64 columns, by its rows of x; what comes beside its steps; what comes beside
# them when two blocks share the columns.
_STEP_TIME = {64: 0.33, 128: 0.45, 192: 0.57, 256: 0.68}
_TILE_TIME, _EXCHANGE_TIME = 4, 2


def large_m_bytes(tokens: int, weight_bytes: int) -> int:
    """Dynamic shared memory of a block, with so many bytes of weights in a step."""
    stage = tokens * 128 + weight_bytes + 128  # the last are scales, where a step needs them
    return 1024 + LARGE_M_STAGES[tokens] * stage + 8 * 1536  # STAGING of each warp


def small_m_bytes(tokens: int, split: int, stages: int, weight_bytes: int) -> int:
    """Dynamic shared memory of a block that multiplies few rows: as above, and sums of the blocks of a cluster."""
    return 1024 + stages * (tokens * 256 + weight_bytes) + (split > 1) * split * -(-8 // split) * tokens * 64


@functools.lru_cache(maxsize=4096)
def _hopper_shape(m: int, n: int, k: int, processors: int) -> tuple[int, int]:
    """Rows of x of a block, and parts of K, with which a product takes the least time."""

    def time(shape: tuple[int, int]) -> float:
        tokens, split = shape
        rounds = -(-(-(-n // 128) * -(-m // tokens)) // (processors // split))
        return rounds * (-(-k // (64 * split)) * _STEP_TIME[tokens] + _TILE_TIME + (split > 1) * _EXCHANGE_TIME)

    return min(((tokens, split) for tokens in LARGE_M_STAGES for split in LARGE_M_SPLITS if split * 64 <= k), key=time)


def _few_shape(m: int, n: int, k: int, bits: int, device: int) -> tuple[int, int, int, int]:
    """Of a product of few rows: rows of x of a block, parts of K, steps under way, bytes of shared memory.

    If a multiprocessor can have a block of its own, a block takes over half of its shared memory, as two that shared
    one would come to their end last; and leaves a third of it to blocks of the kernels before and after.
    """
    _, processors, shared_of_all, _ = _properties(device)
    tokens = next(tokens for tokens in SMALL_M_TILES if m <= tokens)
    blocks = -(-n // 128)
    split = max((split for split in SMALL_M_SPLITS if split * 128 <= k and blocks * split <= processors), default=1)
    is_alone = blocks * split <= processors
    room = shared_of_all * 2 // 3 if is_alone else shared_of_all // 2 - 3072
    stages = min((room - small_m_bytes(tokens, split, 0, 0)) // (tokens * 256 + 2048 * bits), MAX_STAGES)
    needed = small_m_bytes(tokens, split, stages, 2048 * bits)
    return tokens, split, stages, max(needed, shared_of_all // 2) if is_alone else needed


@functools.lru_cache(maxsize=4096)
def _tensor_map(address: int, rows: int, row_bytes: int, box_rows: int, box_bytes: int) -> bytes:
    """What the copy engine has to know of a matrix of bytes: a CUtensorMap, with boxes that are swizzled."""
    cuda = load_libraries().cuda
    memory = ctypes.create_string_buffer(192)
    tensor_map = (ctypes.c_char * 128).from_buffer(memory, -ctypes.addressof(memory) % 64)
    pair, strides = ctypes.c_uint32 * 2, (ctypes.c_uint64 * 1)(row_bytes)
    sizes, box, steps = (ctypes.c_uint64 * 2)(row_bytes, rows), pair(box_bytes, box_rows), pair(1, 1)
    # Bytes (0), 2 dimensions, not interleaved (0), the L2 cache fetches 128 bytes (2), zeros beyond the edges (0).
    given = (0, 2, ctypes.c_void_p(address), sizes, strides, box, steps, 0, {32: 1, 64: 2, 128: 3}[box_bytes], 2, 0)
    cuda.checkCUStatus(cuda.cuda._Lib__lib.cuTensorMapEncodeTiled(ctypes.byref(tensor_map), *given))
    return tensor_map.raw


@functools.cache
def _hopper_has(n: int, k: int, row_bytes: int, device: int) -> bool:
    """Whether there is a kernel for Hopper for a product of these widths there."""
    architecture, *_ = _properties(device)
    return architecture == 90 and k >= 64 and (row_bytes | k * 2 | n * 2) % 16 == 0


def _suits_hopper(m: int, x: torch.Tensor, weight: torch.Tensor, n: int, other: torch.Tensor | None = None) -> bool:
    """Whether the kernels for Hopper multiply M rows of x, several, with this weight to a product of n columns.

    `other` is what else is read 16 bytes at a time.
    """
    if m == 1 or not _hopper_has(n, x.shape[-1], weight.shape[1], x.get_device()) or not weight.is_contiguous():
        return False
    return (x.data_ptr() | weight.data_ptr() | (0 if other is None else other.data_ptr())) % 16 == 0


@functools.lru_cache(maxsize=4096)
def _hopper_launch(kernel: str, m: int, n: int, k: int, weight: int, rows: int, row_bytes: int, device: int) -> tuple:
    """All of a launch that does not depend on x: what `_launch` takes between x and the arguments; and of these the
    tensor map of the weight [rows, row_bytes] at the address `weight`, rows of x of a block, and steps under way."""
    bits = 8 if kernel == "input_gradient" else row_bytes * 8 // k
    # Rows and bytes of the weight in a step.
    box = {"input_gradient": (64, 128), "linear_large_m": (128, 8 * bits), "linear_small_m": (128, 16 * bits)}[kernel]
    module = kernel if kernel == "input_gradient" else f"{kernel}_{bits}"
    tiles = -(-n // 128)
    if kernel == "linear_small_m":
        tokens, split, stages, shared = _few_shape(m, n, k, bits, device)
        blocks, threads = tiles * split, 320
    else:
        processors = _properties(device)[1]
        tokens, split = _hopper_shape(m, n, k, processors)
        stages, shared = 0, large_m_bytes(tokens, box[0] * box[1])
        tiles *= -(-m // tokens)  # a persistent block takes several, unless K is split
        kernel, threads = "linear_large_m", 384
        blocks = min(tiles, processors) if split == 1 else tiles * split
    launch = f"{module}_{tokens}_{split}", kernel, (blocks, 1, 1), threads, shared
    return launch, _tensor_map(weight, rows, row_bytes, *box), tokens, stages


def _multiply_on_hopper(
    kernel: str, m: int, x, weight, y, scale, bias=None, residual=None, alpha=0.0, gelu=False
) -> torch.Tensor:
    """Launch a product y [..., N] of M rows of x [..., K]; returns y."""
    k, n, (rows, row_bytes) = x.shape[-1], y.shape[-1], weight.shape
    launch, weight_map, tokens, stages = _hopper_launch(
        kernel, m, n, k, weight.data_ptr(), rows, row_bytes, x.get_device()
    )
    x_map = _tensor_map(x.data_ptr(), m, k * 2, tokens, 128)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (scale, bias, residual, y)]
    wide = y.dtype == torch.float32
    _CALL.pack_into(_arguments.call, 0, weight_map, x_map, *pointers, alpha, gelu, m, n, k, stages, wide)
    _launch(x, *launch, [_arguments.call])
    return y


def takes_norm(x: torch.Tensor, weight: torch.Tensor, bits: int) -> bool:
    """Whether the kernel that multiplies the rows of x [..., K] by this weight can normalise them first."""
    k, n = x.shape[-1], weight.shape[0]
    m = x.numel() // k
    if _suits_hopper(m, x, weight, n):
        return False
    plan = _plan(m, n, k, bits, weight.get_device())
    if plan is None or weight.data_ptr() % 16 or not weight.is_contiguous():
        return False
    module, _, _, _, shared, _ = plan
    *_, most = _properties(weight.get_device())
    return shared + _norm_bytes(k) + 4096 <= most if m == 1 else module.startswith("linear_m16")


def _norm_bytes(k: int) -> int:
    """Shared memory for weight and bias of a LayerNorm."""
    return 4 * k


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    gelu: bool = False,
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> torch.Tensor:
    """x · (q · scale)ᵀ + bias, then GELU (tanh form) or + alpha · residual: [..., N] of the dtype of x or the residual.

    Args:
        x: float16 or bfloat16 [..., K] on a GPU, M rows in all.
        weight: int8 [N, K]; INT4: [N, K/2] (see `quantization`); bits = 16: [N, K] of x's dtype.
        scale, bias: [N]; scale is None if bits = 16.
        residual: [..., N] of x's dtype or, without gelu, float32.
    """
    if weight.get_device() != x.get_device():
        raise RuntimeError(f"Expected x and the weight on one device, got {x.device} and {weight.device}.")
    x = x.contiguous()
    residual = residual if residual is None else residual.contiguous()
    k, n = x.shape[-1], weight.shape[0]
    m = x.numel() // k
    on_hopper = bits < 16 and m > 0 and _suits_hopper(m, x, weight, n, residual)
    is_wide = residual is not None and residual.dtype != x.dtype
    if is_wide and not (on_hopper and m > MOST_FEW_ROWS and residual.dtype == torch.float32):
        return product(x, weight, scale, bias, bits).add(residual, alpha=alpha)
    scale = scale if scale is None or scale.dtype == x.dtype else scale.to(x.dtype)
    bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
    norm, _local.norm = getattr(_local, "norm", None), None
    if norm is not None and norm[0].data_ptr() != x.data_ptr():
        norm = None  # an error came between the two
    shape = (*x.shape[:-1], n)
    if m == 0:
        return x.new_empty(shape)
    if on_hopper and norm is None:
        kernel = "linear_small_m" if m <= MOST_FEW_ROWS else "linear_large_m"
        y = torch.empty_like(residual) if is_wide else x.new_empty(shape)
        return _multiply_on_hopper(kernel, m, x, weight, y, scale, bias, residual, alpha, gelu)
    aligned = (x.data_ptr() | weight.data_ptr()) % 16 == 0 and weight.is_contiguous()
    plan = _plan(m, n, k, bits, x.get_device()) if aligned else None
    if plan is None:
        wide = weight if bits == 16 else expand(weight.contiguous(), scale, bits)
        if gelu and bias is not None:
            y = torch._addmm_activation(bias, x.view(m, k), wide.T, use_gelu=True)  # in its tanh form, on a GPU
            return y.view(shape)
        y = torch.nn.functional.linear(x, wide, bias)
        y = torch.nn.functional.gelu(y, approximate="tanh") if gelu else y
        return y if residual is None else y.add_(residual, alpha=alpha)
    module, name, grid, block, shared, sums = plan
    y = x.new_empty(shape)
    if m == 1:
        given = {"input": x, "output": y, "weight": weight, "scale": scale, "bias": bias, "residual": residual}
        given |= {"bits": bits, "N": n, "K": k, "gelu": int(gelu), "alpha": float(alpha)}
        if norm is not None:
            given |= dict(zip(("normed", "input", "norm_weight", "norm_bias", "epsilon"), norm, strict=True))
            shared += _norm_bytes(k)
        _operate(x, module, name, grid, shared, **given)
        return y
    if name == "linear_m16":
        normed, x, norm_weight, norm_bias, epsilon = norm or (None, x, None, None, 0.0)
        given = (weight, x, scale, bias, residual, alpha, gelu, y, norm_weight, norm_bias, normed, epsilon, m, n, k)
        _launch(x, module, name, grid, block, shared, _pack("PPPPPfiPPPPfiii", *given))
        return y
    scratch = ()
    if sums is not None:
        scratch = (torch.empty(sums, dtype=torch.float32, device=x.device), _get_tickets(x.device))
    given = (weight, x, scale, bias, residual, alpha, gelu, y, *scratch, m, n, k)
    _launch(x, module, name, grid, block, shared, _pack("PPPPPfiP" + "P" * len(scratch) + "iii", *given))
    return y


def input_gradient(grad_y: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The gradient [..., K] of a `product`'s x, for that of its output [..., N]; both half or bfloat16."""
    n, k = weight.shape
    m = grad_y.numel() // n
    scale = scale if scale.dtype == grad_y.dtype else scale.to(grad_y.dtype)
    if bits == 8 and m > MOST_FEW_ROWS and n % 64 == 0 and _suits_hopper(m, grad_y, weight, k, scale):
        grad_x = grad_y.new_empty(*grad_y.shape[:-1], k)
        return _multiply_on_hopper("input_gradient", m, grad_y, weight, grad_x, scale)
    return grad_y @ expand(weight.contiguous(), scale, bits)


# --- A step's small operations ---


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float, deferred: bool = False
) -> torch.Tensor:
    """LayerNorm over the last of x's dimensions, K; K ≤ 16384 and a multiple of 8.

    deferred: the next to read the result is a `product`, for which `takes_norm` is true; that computes it.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    if deferred:
        _local.norm = (y, x, weight, bias, epsilon)
        return y
    k = x.shape[-1]
    arguments = _pack("PPPPfi", x, weight, bias, y, epsilon, k)
    _launch(x, "prompt", "layer_norm", (x.numel() // k, 1, 1), 512, k * 2, arguments)
    return y


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers side by side, from an address on of which 16 bytes can be read at a time."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _launch_norm(name: str, tensors: tuple, epsilon: float, like: torch.Tensor) -> None:
    """Launch a kernel of `training_norm`; the first two tensors are x and the weight."""
    x, weight, *_ = tensors
    k, numel = x.shape[-1], x.numel()
    if numel:
        eights = 1 if k <= 4096 else 2 if k <= 8192 else 4  # of a row, for which a thread has room
        are_float = x.dtype == torch.float32, weight.dtype == torch.float32
        arguments = _pack("PPPPPfiii", *tensors, epsilon, *are_float, k)
        _launch(like, "training", f"{name}_{eights}", (numel // k, 1, 1), 512, 0, arguments)


def training_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float, rounded_to: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm over the last of x's dimensions, K; K ≤ 16384 and a multiple of 8.

    Args:
        x: float32 or `rounded_to` [..., K].
        weight, bias: [K], both float32 or both `rounded_to`.

    Returns:
        the result in float32, and the same rounded.
    """
    x = _aligned(x)
    y, rounded = torch.empty_like(x, dtype=torch.float32), torch.empty_like(x, dtype=rounded_to)
    _launch_norm("norm_forward", (x, weight, bias, y, rounded), epsilon, rounded)
    return y, rounded


def training_norm_gradient(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, grad_y: torch.Tensor, grad_rounded: torch.Tensor
) -> torch.Tensor:
    """The gradient of x, of its dtype, for those of the results of `training_norm`."""
    x, grad_y, grad_rounded = _aligned(x), _aligned(grad_y), _aligned(grad_rounded)
    grad_x = torch.empty_like(x)
    _launch_norm("norm_backward", (x, weight, grad_y, grad_rounded, grad_x), epsilon, grad_rounded)
    return grad_x


def begin_step(ids, embedding, positions, frequencies, head_dim: int) -> tuple:
    """Embeddings [B, hidden] of ids [B], and fp32 cosines and sines [B, D] of int64 positions [B, R].

    `frequencies` are fp32 [D / 2R].
    """
    batch, rows = positions.shape
    hidden = torch.empty(batch, embedding.shape[1], dtype=embedding.dtype, device=embedding.device)
    cosines, sines = torch.empty(2, batch, head_dim, dtype=torch.float32, device=embedding.device)
    tensors = {"cosines": cosines, "sines": sines, "frequencies": frequencies, "positions": positions}
    given = {"input": ids, "output": hidden, "weight": embedding, "N": embedding.shape[1], "R": rows, **tensors}
    _operate(hidden, f"step_{head_dim}", "begin_step", (batch, 1, 1), 0, **given)
    return hidden, cosines, sines


def end_step(like: torch.Tensor, positions, advance, slots, head_dim: int) -> None:
    """positions += advance, both int64 [B, R]; slots += 1, int32 [B]."""
    given = {"positions": positions, "advance": advance, "slots": slots, "N": positions.numel()}
    given["R"] = positions.shape[1]
    _operate(like, f"step_{head_dim}", "end_step", (1, 1, 1), 0, **given)


@functools.cache
def parts_of_keys(heads: int, device: int) -> int:
    """Into how many parts `attend` had best cut the keys of each of B · H heads.

    Two blocks at a time fit a multiprocessor, and each takes as long to begin and to end as for 75 keys.
    """
    _, processors, *_ = _properties(device)
    return min(range(1, MAX_PARTS + 1), key=lambda parts: -(-heads * parts // (2 * processors)) * (512 / parts + 75))


def attend(qkv, cosines, sines, keys, values, slots, padding, prefix: int, rows: int, most: int) -> torch.Tensor:
    """Attention of one token for each of B sequences, whose keys and values are stored at places `slots` of the caches.

    Args:
        qkv: [B, H · 3 · D], per head D queries, D keys, D values, not rotated.
        cosines, sines: of `begin_step`.
        keys, values: caches [B, H, T, D], of which the places before the slots are filled.
        slots: int32 [B].
        padding: int32 [B]: so many places after the first `prefix` are seen by nobody.
        rows: of positions, R.
        most: into how many parts the keys are cut at most, to be worked on at the same time; up to `MAX_PARTS`.

    Returns:
        [B, H · D].
    """
    batch, heads, places, head_dim = keys.shape
    out = torch.empty(batch, heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    parts = torch.empty(batch * heads * most * (head_dim + 2), dtype=torch.float32, device=qkv.device)
    tensors = {"input": qkv, "output": out, "cosines": cosines, "sines": sines, "keys": keys, "values": values}
    tensors |= {"slots": slots, "padding": padding, "parts": parts, "tickets": _get_tickets(qkv.device)}
    grid = (min(most, -(-places // 64)), batch * heads, 1)
    given = {"H": heads, "T": places, "R": rows, "prefix": prefix, "most": most, **tensors}
    # Of the first, which has more keys on their way, two blocks fit a multiprocessor.
    name = "attend_step" if most * batch * heads <= 2 * _properties(qkv.get_device())[1] else "attend_many"
    _operate(qkv, f"step_{head_dim}", name, grid, 0, **given)
    return out


def split_rotate(qkv, cosines, sines, keys, values, place: int) -> torch.Tensor:
    """The prompt's part of attention before the scores.

    Args:
        qkv: [B, S, H, 3 · D].
        cosines, sines: [B, S, D] of qkv's dtype, in R parts (`rotary_embedding`).
        keys, values: caches [B, H, T, D], filled from `place` on.

    Returns:
        the rotated queries [B, H, S, D], a view of [B, S, H, D]: PyTorch's attention gives its result the same layout.
    """
    batch, length, heads, triple = qkv.shape
    head_dim = triple // 3
    queries = qkv.new_empty(batch, length, heads, head_dim)
    rows = cosines.shape[-2]
    blocks = -(-qkv.numel() // 3 // 8 // 256)
    sizes = (batch, length, heads, head_dim, rows, keys.shape[2], place)
    arguments = _pack("PPPPPPiiiiiii", qkv, cosines, sines, queries, keys, values, *sizes)
    _launch(qkv, "prompt", "split_rotate", (blocks, 1, 1), 256, 0, arguments)
    return queries.transpose(1, 2)


def can_rotate(qkv: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> bool:
    """Whether `rotate` takes these."""
    return (
        qkv.is_cuda
        and not torch.compiler.is_compiling()
        and cosines.device == qkv.device
        and cosines.dtype == sines.dtype == qkv.dtype
        and cosines.shape[-1] % 16 == 0
        and available(qkv.device, qkv.dtype)
    )


def rotate(qkv: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, back: bool = False) -> torch.Tensor:
    """qkv [B, S, H, 3 · D] with its queries and keys rotated by `rotary_embedding` of its dtype, [B, S, 1, R, D / R];
    or rotated back, as gradients are."""
    batch, length, heads, triple = qkv.shape
    qkv = _aligned(qkv)
    out = torch.empty_like(qkv)
    blocks = -(-qkv.numel() // 16 // 256)
    sizes = (batch * length, heads, triple // 3, cosines.shape[-2])
    given = (qkv, cosines.contiguous(), sines.contiguous(), out, -1.0 if back else 1.0, *sizes)
    _launch(qkv, "prompt", "rotate", (blocks, 1, 1), 256, 0, _pack("PPPPfiiii", *given))
    return out
