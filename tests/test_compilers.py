"""Finding a C compiler, its flags on each system, and what happens where a library does not load."""

import ctypes
import logging
import os
import runpy
import shutil
import signal
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from chatglm_int8 import cuda_runtime, kernel_cache, kernels_cpu

GCC = shutil.which("gcc")
needs_gcc = pytest.mark.skipif(GCC is None, reason="needs gcc")


@pytest.fixture
def said(tmp_path, monkeypatch) -> list[str]:
    """As in a new process with an empty cache; what is logged."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CHATGLM_CPU_KERNEL", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernels_cpu, "_quota", lambda: None)

    def forget():
        kernels_cpu._load.cache_clear()
        kernel_cache._usable_folder.cache_clear()
        logging.Logger.warning_once.cache_clear()

    for module in (kernels_cpu, kernel_cache):
        module.logger.addHandler(handler)
    forget()
    yield found
    for module in (kernels_cpu, kernel_cache):
        module.logger.removeHandler(handler)
    monkeypatch.undo()
    forget()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def quick(path: Path, before: str = "") -> str:
    """A compiler that is in haste, after a few lines of shell."""
    return script(path, f'{before}\nexec {GCC} "$@" -O0 -w')


def works(library) -> bool:
    y = library.linear(torch.ones(2, 6), torch.full((3, 6), 2, dtype=torch.int8), torch.ones(3), None, 8)
    return torch.allclose(y, torch.full((2, 3), 12.0), rtol=1e-6)


# Commands


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (r"C:\msys64\ucrt64\bin\gcc.exe", [r"C:\msys64\ucrt64\bin\gcc.exe"]),
        (r'"C:\Program Files\llvm\clang.exe" -m64', [r"C:\Program Files\llvm\clang.exe", "-m64"]),
        (r"gcc '-DA=b c' #", ["gcc", "-DA=b c", "#"]),
    ],
)
def test_backslashes_of_windows_stay(monkeypatch, given, words):
    monkeypatch.setattr(kernel_cache, "WINDOWS", True)
    monkeypatch.setenv("CC", given)
    monkeypatch.setattr(kernel_cache.shutil, "which", lambda word: word if word in words else None)
    assert kernel_cache.compilers()[0] == words


def test_a_path_with_spaces_needs_no_quotes(tmp_path, monkeypatch):
    (tmp_path / "my tools").mkdir()
    path = script(tmp_path / "my tools" / "cc", "exit 0")
    monkeypatch.setenv("CC", path)
    assert kernel_cache.compilers()[0] == [path]


def test_compilers_in_turn(monkeypatch):
    monkeypatch.setenv("CC", "icx -v")
    monkeypatch.setattr(kernel_cache.shutil, "which", lambda word: None if " " in word else word)
    monkeypatch.setattr(kernel_cache.importlib.util, "find_spec", lambda name: name == "ziglang" or None)
    zig = [sys.executable, "-m", "ziglang", "cc"]
    assert kernel_cache.compilers() == [["icx", "-v"], ["cc"], ["gcc"], ["clang"], zig]
    monkeypatch.setattr(kernel_cache.importlib.util, "find_spec", lambda name: None)
    assert zig not in kernel_cache.compilers()


@needs_gcc
@pytest.mark.parametrize("case", ["fails", "is missing"])
def test_another_compiler_is_tried(said, tmp_path, monkeypatch, case):
    monkeypatch.setenv(
        "CC", script(tmp_path / "broken", "echo 'out of cheese' >&2; exit 1") if case == "fails" else "/no"
    )
    monkeypatch.setattr(kernel_cache, "COMPILERS", ((quick(tmp_path / "cc"),),))
    assert works(kernels_cpu.library())
    (message,) = said
    assert str(tmp_path / "cc") in message
    assert ("out of cheese" if case == "fails" else "CC='/no'") in message


@needs_gcc
@pytest.mark.parametrize("refused", ["-march=native", "-mcpu=native"])
def test_machines_that_lack_a_flag(said, tmp_path, monkeypatch, refused):
    """clang on ARM and gcc on POWER know -mcpu=native alone, gcc on RISC-V neither."""
    patterns = "*-march=native*" if refused == "-march=native" else "*-march=native*|*-mcpu=native*"
    monkeypatch.setenv("CC", quick(tmp_path / "cc", f'case "$*" in {patterns}) echo unknown >&2; exit 1;; esac'))
    monkeypatch.setattr(kernel_cache, "COMPILERS", ())
    assert works(kernels_cpu.library())
    assert not said


# Flags


def flags_of(monkeypatch, clang: bool, runtime: str | None, **system) -> list[tuple[str, ...]]:
    for name, value in system.items():
        monkeypatch.setattr(kernel_cache, name, value)
    monkeypatch.setattr(kernel_cache, "openmp_runtime", lambda: runtime and Path(runtime))
    monkeypatch.setattr(kernels_cpu, "_machine_macros", lambda command: "#define __clang__ 1" if clang else "")
    return list(kernels_cpu.flag_sets(["cc"]))


@pytest.mark.parametrize("new", [True, False])
def test_gcc_on_windows(monkeypatch, new):
    """No library that ctypes' search misses; vectors on a stack of 16 bytes' alignment."""
    first, second, *_ = flags_of(monkeypatch, False, None, WINDOWS=True, assembles=lambda command: new)
    assert {"-static", "-fopenmp", "-march=native"} <= set(first)
    assert "-fPIC" not in first
    assert ("-Wa,-muse-unaligned-vector-move" in first) == new
    assert "-fopenmp" not in second


def test_clang_takes_the_runtime_that_is_loaded(monkeypatch):
    def openmp(*given, **system):
        with monkeypatch.context() as patch:
            flags = flags_of(patch, *given, **system)[0]
        return flags[flags.index("-march=native") + 1 :]

    assert openmp(True, "/t/libgomp.so.1") == ("-Xclang", "-fopenmp", "-DOPENMP_OVER_GOMP")
    assert openmp(True, "/t/libiomp5.so") == ("-Xclang", "-fopenmp")
    dynamic = "-Wl,-undefined,dynamic_lookup"
    assert openmp(True, "/t/libomp.dylib", MACOS=True) == ("-Xclang", "-fopenmp", dynamic)
    dll = "/t/libiomp5md.dll"
    assert openmp(True, dll, WINDOWS=True) == ("-Xclang", "-fopenmp", dll)
    assert openmp(True, None) == openmp(False, "/t/libgomp.so.1") == ("-fopenmp",)


def test_the_runtime_that_is_loaded_is_found():
    runtime = kernel_cache.openmp_runtime()
    assert runtime is None or (runtime.exists() and "omp" in runtime.name)
    if Path("/proc/self/maps").exists() and torch.backends.openmp.is_available():
        assert runtime is not None


@pytest.mark.parametrize("name", ["libomp.dylib", "libiomp5md.dll"])
def test_the_runtime_of_a_wheel(tmp_path, monkeypatch, name):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / name).touch()
    monkeypatch.setattr(kernel_cache.torch, "__file__", str(tmp_path / "__init__.py"))

    def no_maps(path, **_):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", no_maps)
    assert kernel_cache.openmp_runtime() == tmp_path / "lib" / name


# Loading


@needs_gcc
def test_openmp_that_does_not_load(said, tmp_path, monkeypatch):
    """As where a library needs libgomp-1.dll: error 126."""
    monkeypatch.setenv("CC", quick(tmp_path / "cc"))
    real = kernels_cpu._open

    def without(flags, compiler):
        if "-fopenmp" in flags:
            raise OSError("[WinError 126] The specified module could not be found")
        return real(flags, compiler)

    monkeypatch.setattr(kernels_cpu, "_open", without)
    assert works(kernels_cpu.library())
    (message,) = said
    assert "one thread" in message
    assert "126" in message


@needs_gcc
def test_a_home_that_is_mounted_noexec(said, tmp_path, monkeypatch):
    """The library loads from a temporary folder, and is compiled once."""
    count = tmp_path / "count"
    monkeypatch.setenv("CC", quick(tmp_path / "cc", f'case "$*" in *-shared*-o*) echo >> {count};; esac'))
    monkeypatch.setattr(kernel_cache, "COMPILERS", ())
    real = ctypes.CDLL

    def cdll(path, *args, **settings):
        if path and str(path).startswith(str(tmp_path / "cache")):
            raise OSError(f"{path}: failed to map segment from shared object")
        return real(path, *args, **settings)

    monkeypatch.setattr(ctypes, "CDLL", cdll)
    for _ in range(2):
        assert works(kernels_cpu.library())
        kernels_cpu._load.cache_clear()
    assert count.read_text() == "\n"
    assert not said


def test_a_file_that_another_process_has_loaded(said, tmp_path, monkeypatch):
    """Windows refuses to replace a loaded library; if it is whole, it is what was wanted."""

    def refuse(source, target):
        raise PermissionError(13, "Access is denied", str(target))

    monkeypatch.setattr(os, "replace", refuse)
    path = kernel_cache.cache_folder() / "library"

    def write(unfinished):
        unfinished.write_text("mine")
        path.write_text("theirs")

    assert kernel_cache.keep("library", write).read_text() == "theirs"
    assert os.listdir(path.parent) == ["library"]
    with pytest.raises(PermissionError):
        kernel_cache.keep("other", lambda unfinished: unfinished.write_text("mine"))


@needs_gcc
def test_what_a_compiler_leaves_beside_a_library_goes(said, tmp_path, monkeypatch):
    """zig for Windows writes NAME.pdb and NAME.lib."""
    leave = 'out=; for word; do [ "$out" = next ] && touch "$word.pdb"; out=; [ "$word" = -o ] && out=next; done'
    monkeypatch.setenv("CC", quick(tmp_path / "cc", leave))
    monkeypatch.setattr(kernel_cache, "COMPILERS", ())
    assert works(kernels_cpu.library())
    assert [Path(name).suffix for name in os.listdir(kernel_cache.cache_folder())] == [".so"]


@pytest.mark.parametrize(
    ("system", "words"),
    [({"WINDOWS": True}, "winget install"), ({"MACOS": True}, "xcode-select --install"), ({}, "apt-get install gcc")],
)
def test_what_is_said_when_nothing_works(said, monkeypatch, system, words):
    monkeypatch.setattr(kernel_cache, "COMPILERS", ())
    for name, value in system.items():
        monkeypatch.setattr(kernel_cache, name, value)
    monkeypatch.setattr(kernel_cache.shutil, "which", lambda word: word if word == "apt-get" else None)
    assert kernels_cpu.library() is None
    (message,) = said
    assert "20 to 50 times slower" in message
    assert words in message


# CPU quotas


@pytest.mark.parametrize(
    ("line", "files", "quota"),
    [
        ("0::/", {"cpu.max": "100000 100000"}, 1),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {}, None),
        ("0::/outer/inner", {"outer/cpu.max": "50000 100000", "outer/inner/cpu.max": "max 100000"}, 1),
        ("0::/outer", {"unified/outer/cpu.max": "300000 100000"}, 3),
        ("3:cpu:/docker/1", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("3:cpu,cpuacct:/", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, None),
        ("5:memory:/", {"memory/cpu.max": "100000 100000"}, None),
    ],
)
def test_a_quota_is_read(tmp_path, line, files, quota):
    for name, text in {"proc/self/cgroup": line, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert kernels_cpu.cpu_quota(tmp_path) == quota


def test_without_control_groups(tmp_path):
    assert kernels_cpu.cpu_quota(tmp_path) is None


@needs_gcc
def test_no_more_threads_than_the_quota(said, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", quick(tmp_path / "cc"))
    monkeypatch.setattr(kernels_cpu, "_quota", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    library, given = kernels_cpu.library(), []
    (message,) = said
    assert "OMP_NUM_THREADS=2" in message
    monkeypatch.setattr(library, "_gelu", lambda *arguments: given.append(arguments[-1]))
    library.gelu_(torch.ones(4))
    library.gelu_(torch.ones(4), threads=3)
    assert given == [2, 3]


# Elsewhere


def test_nvrtc_13_of_a_windows_wheel(tmp_path, monkeypatch):
    path = tmp_path / "cu13" / "bin" / "x86_64" / "nvrtc64_130_0.dll"
    path.parent.mkdir(parents=True)
    path.touch()
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(cuda_runtime.importlib.util, "find_spec", lambda name: spec if name == "nvidia" else None)
    monkeypatch.setattr(cuda_runtime.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    assert cuda_runtime.find_library("nvrtc") == str(path)


def test_ray_waits_so_that_windows_hears_ctrl_c(root, monkeypatch):
    from chatglm_int8.apps import cli, ray

    class Event:
        def wait(self, timeout=None):
            assert timeout, "a wait without limit is deaf to Ctrl-C on Windows"
            return True

    serve = types.SimpleNamespace(start=lambda **_: None, run=lambda *_, **__: None, shutdown=lambda: None)
    fake = types.SimpleNamespace(init=lambda **_: None, serve=serve)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    monkeypatch.setattr(ray, "application", lambda *_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(threading, "Event", Event)
    monkeypatch.setattr(sys, "argv", ["chatglm", "ray", "--model", str(root)])
    cli.main()


def test_the_benchmark_starts_without_resource(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    module = runpy.run_path(str(root / "benchmarks" / "generate.py"), run_name="generate")
    assert module["peak_memory"]() is None
