"""The CUDA runtime of the kernels: finds libraries, compiles modules, keeps them, launches their kernels.

A module is a file of `kernels/cuda`, carried by `kernel_sources`. NVRTC compiles it through the binding of cpm_kernels,
whose `LazyKernelCModule` loads it and whose `KernelFunction` launches its kernels. Compiled modules are kept on disk
(see `kernel_cache`).
"""

import ctypes
import functools
import glob
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from .kernel_cache import keep
from .kernel_sources import FILES

SOURCES = {name: text for name, text in FILES.items() if name.startswith("kernels/cuda/")}
_SHARED_LIMIT = 32 * 1024  # of dynamic shared memory without asking for more; static may add 16 KB
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
        for parts in (("lib",), ("bin",), ("bin", "x86_64")):  # the last is CUDA 13's on Windows
            folders += glob.glob(os.path.join(folder, "*", *parts))
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


# --- Modules: compiling, with a cache on disk ---


@dataclass(frozen=True, eq=False)
class Module:
    """A file of `kernels/cuda` compiled with some constants.

    Args:
        name: of its file in the cache.
        file: without folder and suffix.
        constants: macros.
        family: modules that are compiled side by side when the first of them is needed.
    """

    name: str
    file: str
    constants: dict[str, int] = field(default_factory=dict)
    family: list["Module"] = field(default_factory=list)

    def options(self, bf16: bool, architecture: int) -> list[str]:
        """Options for the compiler. sm_90a has instructions that are Hopper's alone."""
        special = "a" if self.file.startswith("hopper/") else ""
        defined = [f"-D{key}={value}" for key, value in {"BF16": int(bf16), **self.constants}.items()]
        return ["--std=c++17", f"--gpu-architecture=sm_{architecture}{special}", *defined]


def compile_module(nvrtc, module: Module, options: list[str]) -> bytes:
    """Compile a module to machine code (a cubin), or to PTX where `options` name a virtual architecture.

    Args:
        nvrtc: the binding, `cpm_kernels.library.nvrtc`.

    Raises:
        RuntimeError: the compiler's errors, with file and line in `kernels/cuda`.
    """
    file = f"kernels/cuda/{module.file}.cuh"
    program = nvrtc.nvrtcProgram()
    nvrtc.nvrtcCreateProgram(program, SOURCES[file], file, len(SOURCES), list(SOURCES.values()), list(SOURCES))
    try:
        nvrtc.nvrtcCompileProgram(program, len(options), options)
        kind = "PTX" if any("=compute_" in option for option in options) else "CUBIN"
        code = ctypes.create_string_buffer(getattr(nvrtc, f"nvrtcGet{kind}Size")(program))
        getattr(nvrtc, f"nvrtcGet{kind}")(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def module_code(nvrtc, module: Module, bf16: bool, architecture: int) -> bytes:
    """Machine code of a module, from the cache on disk if it is there."""
    options = module.options(bf16, architecture)
    key = repr((module.file, SOURCES, options, nvrtc.version))
    file = f"cuda-{module.name}-sm_{architecture}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"
    return keep(file, lambda path: path.write_bytes(compile_module(nvrtc, module, options))).read_bytes()


@functools.cache
def _loaded(module: Module, bf16: bool, architecture: int):
    """A `LazyKernelCModule`, compiled if it is not in the cache."""
    return load_launcher().LazyKernelCModule(module_code(load_libraries().nvrtc, module, bf16, architecture))


def _compile(modules: list[Module], bf16: bool, architecture: int) -> None:
    """Compile the modules that are in no cache, side by side."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda module: _loaded(module, bf16, architecture), modules))


def load(modules: list[Module], bf16: bool, device: int) -> None:
    """Compile modules and load them on a device. Not while a graph is captured.

    Raises:
        Exception: a library is missing, or the compiler or the driver fails.
    """
    architecture, *_ = properties(device)
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        load_launcher()
        _compile(modules, bf16, architecture)
        for module in modules:
            _loaded(module, bf16, architecture).get_module()


@functools.cache
def properties(device: int) -> tuple[int, int, int, int]:
    """Compute capability (90 = 9.0), number of multiprocessors, and bytes of shared memory of each and for a block."""
    of = torch.cuda.get_device_properties(device)
    shared, most = of.shared_memory_per_multiprocessor, of.shared_memory_per_block_optin
    return of.major * 10 + of.minor, of.multi_processor_count, shared, most


# --- Launching ---


@functools.cache
def _function(module: Module, kernel: str, bf16: bool, device: int, much_shared: bool):
    """A `KernelFunction` for one device, the current one. much_shared: it may use all of the shared memory."""
    architecture, *_ = properties(device)
    if module.family:
        _compile(module.family, bf16, architecture)
    function = load_launcher().KernelFunction(_loaded(module, bf16, architecture), kernel)
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
    *_, most = properties(device)
    cuda.checkCUStatus(write(handle, 8, most - static.value))  # ..._MAX_DYNAMIC_SHARED_SIZE_BYTES


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


def launch(
    like: torch.Tensor, module: Module, kernel: str, grid: tuple, block: int, shared: int, arguments: ctypes.Structure
) -> None:
    """Launch a kernel on the device of `like`, for its dtype, on PyTorch's current stream.

    Args:
        shared: bytes of dynamic shared memory.
        arguments: the struct that the kernel takes.
    """
    index = like.get_device()
    if torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):
            return launch(like, module, kernel, grid, block, shared, arguments)
    function = _function(module, kernel, like.dtype == torch.bfloat16, index, shared > _SHARED_LIMIT)
    stream = torch._C._cuda_getCurrentRawStream(index)
    if torch.cuda.is_current_stream_capturing() and properties(index)[0] >= 90:
        # cpm_kernels has no launch with attributes. In a graph the next kernel may begin before this one has ended.
        cuda = load_libraries().cuda
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        config = _LaunchConfig((*grid, block, 1, 1, shared), stream, ctypes.pointer(_DEPENDENT), 1)
        start = cuda.cuda._Lib__lib.cuLaunchKernelEx
        cuda.checkCUStatus(start(ctypes.byref(config), function._prepare_func(), pointers, None))
    else:
        function(grid, (block, 1, 1), shared, stream, [arguments])
    return None


# --- Arrival counters of split-K and of attention over parts of the keys ---

ARRIVALS = 1 << 16
_arrivals: dict[tuple[int, int], torch.Tensor] = {}


class own_arrivals:
    """Context: launches of this thread use these arrival counters, int32 zeros [65536].

    A graph needs its own: it may replay beside other work.
    """

    def __init__(self, arrivals: torch.Tensor):
        self.arrivals = arrivals

    def __enter__(self) -> None:
        self.before, _local.arrivals = getattr(_local, "arrivals", None), self.arrivals

    def __exit__(self, *error) -> None:
        _local.arrivals = self.before


def new_arrivals(device: torch.device) -> torch.Tensor:
    """Arrival counters, int32 zeros [65536]. Each launch leaves zeros."""
    return torch.zeros(ARRIVALS, dtype=torch.int32, device=device)


def get_arrivals(device: torch.device) -> torch.Tensor:
    """The arrival counters for a launch now."""
    own = getattr(_local, "arrivals", None)
    if own is not None and own.device == device:
        return own
    if torch.cuda.is_current_stream_capturing():
        return new_arrivals(device)  # a graph of the caller's: zeroed at each replay
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)  # launches of a stream follow each other
    if key not in _arrivals:
        _arrivals[key] = new_arrivals(device)
    return _arrivals[key]
