"""The CUDA kernels: that they compile, how their libraries are found, and on a GPU what they compute."""

import ctypes
import importlib.util
import os
import re
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from chatglm_int8 import cuda_plans, cuda_runtime, kernels_cuda
from chatglm_int8.modeling_chatglm import apply_rotary, rotary_embedding
from chatglm_int8.ops import rotate
from chatglm_int8.quantization import dequantize_weight

MODULES = cuda_plans.MODULES
HOPPER = [name for name, module in MODULES.items() if module.file.startswith("hopper/")]
ARCHITECTURES = {12: [70, 75, 80, 90], 13: [75, 80, 86, 89, 90, 100, 120]}
on_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
# Of norms. Inputs are given, sums are fp32, so what remains is the rounding of the result: half a unit in the last
# place at most, a third of that on average; and the plain path rounds the weights too.
TOLERANCE = {torch.float16: 2**-11, torch.bfloat16: 2**-8}


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.fixture
def fresh_libraries(monkeypatch):
    """Forgets the copy of cpm_kernels, before and after."""
    if importlib.util.find_spec("cpm_kernels") is None:
        pytest.skip("needs cpm_kernels: pip install cpm_kernels")

    def forget():
        cuda_runtime.load_libraries.cache_clear()
        for name in [name for name in sys.modules if name.startswith(cuda_runtime._PRIVATE)]:
            del sys.modules[name]

    forget()
    yield
    forget()


def load_nvrtc(major: int, monkeypatch) -> types.ModuleType:
    """The binding of NVRTC of this version, which is all that is found then."""
    nvidia = importlib.util.find_spec("nvidia")
    for folder in nvidia.submodule_search_locations if nvidia else ():
        for path in Path(folder).glob(f"*/lib/libnvrtc.so.{major}"):
            monkeypatch.setattr(cuda_runtime, "find_library", {"nvrtc": str(path)}.get)
            return cuda_runtime.load_libraries().nvrtc
    wheel = "nvidia-cuda-nvrtc" + ("-cu12" if major == 12 else "")
    pytest.skip(f"needs NVRTC {major}: pip install {wheel}")


@pytest.mark.parametrize(
    ("major", "architecture"), [(major, number) for major, numbers in ARCHITECTURES.items() for number in numbers]
)
def test_compiles(major, architecture, monkeypatch, fresh_libraries):
    nvrtc = load_nvrtc(major, monkeypatch)
    assert nvrtc.version[0] == major
    # The others differ from these in a number.
    names = ["linear_m1_8", "linear_m1_4", "linear_m1_16", "linear_m8_8", "linear_m8_4"]
    names += ["prompt", "training", "step_128", "linear_tiles_8_16", "linear_tiles_4_64"]
    if architecture >= 80:
        names += ["linear_m16_8_16", "linear_m16_4_8"]
    if architecture == 90:
        names += ["linear_large_m_8_256_2", "linear_large_m_4_64_1", "input_gradient_192_2"]
        names += ["linear_small_m_8_16_3", "linear_small_m_4_32_1", "linear_small_m_8_8_2"]
    others = [name for name in MODULES if name not in HOPPER]  # those have a test below
    jobs = [(name, 0) for name in (others if architecture == 90 else names)]
    jobs += [(name, 1) for name in names if architecture >= 80]

    def compile_one(job):
        name, bf16 = job
        return cuda_runtime.compile_module(nvrtc, MODULES[name], MODULES[name].options(bf16, architecture))

    with ThreadPoolExecutor() as pool:
        for job, code in zip(jobs, pool.map(compile_one, jobs), strict=True):
            assert code[:4] == b"\x7fELF", job


@pytest.mark.parametrize("major", [12, 13])
def test_products_on_hopper_are_not_serialised(major, monkeypatch, fresh_libraries):
    """The compiler waits for every product where it can't follow their registers, and says so."""
    nvrtc = load_nvrtc(major, monkeypatch)
    logs, destroy = [], nvrtc.nvrtcDestroyProgram

    def keep_log(program):
        log = ctypes.create_string_buffer(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        logs.append(log.value.decode())
        destroy(program)

    monkeypatch.setattr(nvrtc, "nvrtcDestroyProgram", keep_log)

    def compile_one(name):
        return cuda_runtime.compile_module(nvrtc, MODULES[name], MODULES[name].options(False, 90))

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, HOPPER))
    assert logs
    assert not any("serialized" in log for log in logs)
    file, touched = "kernels/cuda/hopper/linear_large_m.cuh", "sums[0] += 1; load_fragments(stage, 1, fragments[1]);"
    changed = cuda_runtime.SOURCES[file].replace("load_fragments(stage, 1, fragments[1]);", touched)
    monkeypatch.setitem(cuda_runtime.SOURCES, file, changed)
    compile_one("linear_large_m_8_64_1")
    assert "serialized" in logs[-1]  # so the test could fail


ARGUMENTS = {
    kernels_cuda.LinearM1: ("linear_m1_8", "linear_m1"),
    kernels_cuda.LinearM8: ("linear_m8_8", "linear_m8"),
    kernels_cuda.LinearM16: ("linear_m16_8_8", "linear_m16"),
    kernels_cuda.LinearTiles: ("linear_tiles_8_8", "linear_tiles"),
    kernels_cuda.LinearSmallM: ("linear_small_m_8_8_1", "linear_small_m"),
    kernels_cuda.LinearLargeM: ("linear_large_m_8_64_1", "linear_large_m"),
    kernels_cuda.Expand: ("prompt", "expand_8"),
    kernels_cuda.LayerNorm: ("prompt", "layer_norm"),
    kernels_cuda.SplitRotate: ("prompt", "split_rotate"),
    kernels_cuda.Rotate: ("prompt", "rotate"),
    kernels_cuda.NormForward: ("training", "norm_forward_1"),
    kernels_cuda.NormBackward: ("training", "norm_backward_1"),
    kernels_cuda.BeginStep: ("step_128", "begin_step"),
    kernels_cuda.EndStep: ("step_128", "end_step"),
    kernels_cuda.DecodeAttention: ("step_128", "attend_step"),
}


def cuda_fields(struct: str) -> list[str]:
    """The fields of a struct in kernels/cuda in order, those of its members Epilogue and Norm in their places."""
    (body,) = re.findall(rf"struct {struct} {{(.*?)}};", "".join(cuda_runtime.SOURCES.values()), re.S)
    fields = []
    for declaration in re.sub("//.*", "", body).split(";")[:-1]:
        kind, *_ = declaration.split()
        names = [re.findall(r"\w+", name)[-1] for name in declaration.split(",")]
        fields += cuda_fields(kind) if kind in ("Epilogue", "Norm") else names
    return fields


def python_fields(struct: type) -> list[str]:
    fields = []
    for name, kind in struct._fields_:
        is_part = isinstance(kind, type) and issubclass(kind, ctypes.Structure)
        fields += python_fields(kind) if is_part else [name]
    return [name for name in fields if name != "padding_to_64"]


@pytest.mark.parametrize("struct", ARGUMENTS)
def test_arguments_have_the_fields_and_the_size_of_the_kernels(struct, monkeypatch, fresh_libraries):
    assert python_fields(struct) == cuda_fields(struct.__name__)
    nvrtc = load_nvrtc(13, monkeypatch)
    name, kernel = ARGUMENTS[struct]
    options = [option.replace("=sm_", "=compute_") for option in MODULES[name].options(False, 90)]
    ptx = cuda_runtime.compile_module(nvrtc, MODULES[name], options).decode()
    assert f".b8 {kernel}_param_0[{ctypes.sizeof(struct)}]" in ptx


def test_what_the_compiler_says_is_passed_on(monkeypatch, fresh_libraries):
    nvrtc = load_nvrtc(13, monkeypatch)
    changed = cuda_runtime.SOURCES["kernels/cuda/mma.cuh"] + "__device__ int i = no_such_thing;\n"
    monkeypatch.setitem(cuda_runtime.SOURCES, "kernels/cuda/mma.cuh", changed)
    place = rf"kernels/cuda/mma.cuh\({changed.count(chr(10))}\): error.*no_such_thing"
    with pytest.raises(RuntimeError, match=place):
        cuda_runtime.compile_module(nvrtc, MODULES["linear_m1_8"], MODULES["linear_m1_8"].options(False, 90))


def test_library_search_in_wheels(tmp_path, monkeypatch):
    names = ("cu13/lib/libcudart.so.13", "cuda_runtime/lib/libcudart.so.12", "cuda_nvrtc/lib/libnvrtc.so.12")
    others = ("cu13/lib/libnvrtc-builtins.so.13.0", "cuda_nvrtc/lib/libnvrtc.alt.so.12", "cu13/lib/libcudart.so.13.txt")
    for name in (*names, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(cuda_runtime.importlib.util, "find_spec", lambda name: spec if name == "nvidia" else None)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    for cuda, expected in (("12.8", names[1]), ("13.0", names[0]), (None, names[0])):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert cuda_runtime.find_library("cudart") == str(tmp_path / expected)
        assert cuda_runtime.find_library("nvrtc") == str(tmp_path / names[2])
    assert cuda_runtime.find_library("cublasLt") is None


def test_the_users_modules_and_environment_are_left_alone(monkeypatch, fresh_libraries):
    theirs = types.ModuleType("cpm_kernels")
    theirs.__spec__ = importlib.util.find_spec("cpm_kernels")
    monkeypatch.setitem(sys.modules, "cpm_kernels", theirs)
    modules, environment = {name for name in sys.modules}, dict(os.environ)
    libraries = cuda_runtime.load_libraries()
    assert libraries.nvrtc.__file__.startswith(os.path.dirname(theirs.__spec__.origin))
    assert sys.modules["cpm_kernels"] is theirs
    added = {name for name in set(sys.modules) - modules if "cpm_kernels" in name or name == "pkg_resources"}
    assert all(name.startswith(cuda_runtime._PRIVATE) for name in added)
    assert dict(os.environ) == environment


def test_a_missing_library_is_said_with_its_remedy(monkeypatch):
    def missing():
        raise ImportError("cpm_kernels is not installed")

    monkeypatch.setattr(cuda_runtime, "load_launcher", missing)
    monkeypatch.setattr(kernels_cuda, "properties", lambda device: (90, 132, 233472, 232448))
    monkeypatch.setattr(cuda_runtime, "properties", lambda device: (90, 132, 233472, 232448))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "device", lambda index: warnings.catch_warnings())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(kernels_cuda, "_availability", {})
    gpu = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match="cpm_kernels is not installed.*pip install cpm_kernels"):
        assert not kernels_cuda.available(gpu, torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels_cuda.available(gpu, torch.float16)  # said once


def test_not_available_elsewhere(monkeypatch):
    assert not kernels_cuda.available(torch.device("cpu"), torch.float16)
    assert not kernels_cuda.available(torch.device("cuda", 0), torch.float32)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not kernels_cuda.available(torch.device("cuda", 0), torch.float16)


# Multiprocessors, bytes of shared memory of each and, at most, of a block.
DEVICES = {70: (80, 98304, 98304), 75: (40, 65536, 65536), 80: (108, 167936, 166912), 86: (84, 102400, 101376)}
DEVICES |= {89: (128, 102400, 101376), 90: (132, 233472, 232448), 100: (148, 233472, 232448)}
DEVICES |= {120: (170, 102400, 101376)}


@pytest.mark.parametrize("architecture", DEVICES)
def test_every_launch_fits_the_device(architecture, monkeypatch):
    monkeypatch.setattr(cuda_plans, "properties", lambda device: (architecture, *DEVICES[architecture]))
    *_, most = DEVICES[architecture]
    planned = set()
    for bits in (8, 4, 16):
        for n, k in ((12288, 4096), (4096, 16384), (40, 65536), (17, 64)):
            for m in range(1, 130):
                plan = cuda_plans.linear_plan.__wrapped__(m, n, k, bits, 0)
                if plan is None:
                    continue
                assert plan.module in MODULES.values()
                static = {"linear_m1": 4096, "linear_m8": 4096, "linear_m16": 0}.get(plan.kernel, 64)  # bytes, at most
                assert max(plan.shared, plan.norm_shared or 0) + static <= most, plan
                assert min(plan.grid) > 0
                assert plan.grid[0] * plan.block >= 32
                planned.add(m)
    assert planned >= set(range(1, 9))
    assert architecture < 75 or planned >= set(range(1, 65))  # beyond, expanding the weight may be as fast


def test_every_launch_on_hopper_fits_the_device(monkeypatch):
    processors, _, most = DEVICES[90]
    monkeypatch.setattr(cuda_plans, "properties", lambda device: (90, *DEVICES[90]))
    for n, k in ((12288, 4096), (4096, 16384), (40, 65536), (24, 64), (8, 128)):
        for m in range(33, 2100, 7):
            tokens, split = cuda_plans.large_m_shape(m, n, k, processors)
            for module in ("linear_large_m_8", "linear_large_m_4", "input_gradient"):
                assert f"{module}_{tokens}_{split}" in MODULES
            assert cuda_plans.large_m_bytes(tokens, 8192) + 128 <= most
            assert k // 64 >= split
    for n, k in ((12288, 4096), (4096, 16384), (40, 65536), (24, 64), (200000, 128)):
        for m in range(2, 33):
            for bits in (8, 4):
                tokens, split, stages, shared = cuda_plans.small_m_shape(m, n, k, bits, 0)
                assert f"linear_small_m_{bits}_{tokens}_{split}" in MODULES
                assert tokens >= m
                assert split == 1 or k // 128 >= split
                assert 1 < stages <= cuda_plans.MAX_STAGES
                assert cuda_plans.small_m_bytes(tokens, split, stages, 2048 * bits) <= shared <= most - 2048
    # The prompts that benchmarks ask about, by measurement: the widest tiles; of few, K is cut.
    assert cuda_plans.large_m_shape(2048, 4096, 16384, processors) == (256, 1)
    assert cuda_plans.large_m_shape(512, 4096, 16384, processors) == (256, 2)


@pytest.fixture
def launched(monkeypatch):
    """Launches on an H100, which record (module, kernel, arguments) and compute nothing; tensors may be on the CPU."""
    launches = []

    def launch(like, module, kernel, grid, block, shared, arguments):
        launches.append((module.name, kernel, arguments))

    for module in (cuda_plans, kernels_cuda):
        monkeypatch.setattr(module, "properties", lambda device: (90, *DEVICES[90]))
    monkeypatch.setattr(kernels_cuda, "launch", launch)
    monkeypatch.setattr(kernels_cuda, "_tensor_map", lambda *given: kernels_cuda.TensorMap())
    arrivals = torch.zeros(cuda_runtime.ARRIVALS, dtype=torch.int32)
    monkeypatch.setattr(kernels_cuda, "get_arrivals", lambda device: arrivals)
    return launches


def assert_given(launch, struct, **expected):
    """A launch with a struct of this kind and these values; tensors stand for their addresses."""
    _, kernel, arguments = launch
    assert type(arguments) is struct
    assert kernel.startswith(ARGUMENTS[struct][1].rstrip("_0123456789"))
    for name, value in expected.items():
        value = value.data_ptr() if isinstance(value, torch.Tensor) else value
        assert getattr(arguments, name) == value, name


def test_kernels_are_given_what_the_call_was_given(launched):
    k, n, heads, dim = 64, 32, 2, 16
    x, weight, scale, bias = torch.zeros(3, k).half(), torch.zeros(n, k, dtype=torch.int8), *torch.zeros(2, n).half()
    norm = {"norm_weight": torch.zeros(k).half(), "norm_bias": torch.zeros(k).half()}
    residual = torch.zeros(3, n).half()
    y = kernels_cuda.product(x, weight, scale, bias, residual=residual, alpha=7.5)
    given = {
        "scale": scale,
        "bias": bias,
        "residual": residual,
        "y": y,
        "alpha": 7.5,
        "gelu": 0,
        "M": 3,
        "N": n,
        "K": k,
    }
    assert_given(launched.pop(), kernels_cuda.LinearSmallM, **given)
    y = kernels_cuda.product(x[:1], weight, scale, bias, gelu=True)
    given = {
        "x": x,
        "weight": weight,
        "scale": scale,
        "bias": bias,
        "residual": None,
        "y": y,
        "gelu": 1,
        "N": n,
        "K": k,
    }
    assert_given(launched.pop(), kernels_cuda.LinearM1, **given, norm_weight=None, normed=None)
    normed, y = kernels_cuda.norm_linear(x[:1], *norm.values(), 0.5, weight, scale, bias)
    given |= {"y": y, "gelu": 0}
    assert_given(launched.pop(), kernels_cuda.LinearM1, **given, **norm, normed=normed, epsilon=0.5)
    # Hopper's own kernels take no norm.
    normed, y = kernels_cuda.norm_linear(x, *norm.values(), 0.5, weight, scale, bias)
    assert_given(launched.pop(), kernels_cuda.LinearSmallM, y=y, M=3)
    given = {"x": x, "weight": norm["norm_weight"], "bias": norm["norm_bias"], "y": normed, "epsilon": 0.5, "K": k}
    assert_given(launched.pop(), kernels_cuda.LayerNorm, **given)
    out = kernels_cuda.expand(weight, scale, 8)
    assert_given(launched.pop(), kernels_cuda.Expand, weight=weight, scale=scale, y=out, N=n, K=k)

    weights = norm["norm_weight"], norm["norm_bias"]
    y, rounded = kernels_cuda.training_norm(x, *weights, 0.5, torch.float16)
    given = {"x": x, "weight": weights[0], "epsilon": 0.5, "x_is_float": 0, "weight_is_float": 0, "K": k}
    assert_given(launched.pop(), kernels_cuda.NormForward, **given, bias=weights[1], y=y, rounded=rounded)
    grad_x = kernels_cuda.training_norm_gradient(x, weights[0], 0.5, y, rounded)
    assert_given(launched.pop(), kernels_cuda.NormBackward, **given, grad_y=y, grad_rounded=rounded, grad_x=grad_x)

    ids, positions = torch.zeros(3, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long)
    embedding, frequencies = torch.zeros(5, k).half(), torch.zeros(dim // 4)
    slots, padding = torch.zeros(2, 3, dtype=torch.int32)
    hidden, cosines, sines = kernels_cuda.begin_step(ids, embedding, positions, frequencies, dim)
    given = {"ids": ids, "embedding": embedding, "positions": positions, "frequencies": frequencies, "hidden": hidden}
    assert_given(launched.pop(), kernels_cuda.BeginStep, **given, cosines=cosines, sines=sines, width=k, R=2)
    kernels_cuda.end_step(hidden, positions, ids, slots, dim)
    assert_given(launched.pop(), kernels_cuda.EndStep, positions=positions, advance=ids, slots=slots, B=3, R=2)
    keys, values = torch.zeros(2, 3, heads, 7, dim).half()
    qkv = torch.zeros(3, heads * 3 * dim).half()
    y = kernels_cuda.attend(qkv, cosines, sines, keys, values, slots, padding, 1, 2, 4)
    given = {"qkv": qkv, "cosines": cosines, "sines": sines, "keys": keys, "values": values, "slots": slots, "y": y}
    given |= {"padding": padding, "H": heads, "T": 7, "R": 2, "prefix": 1, "max_parts": 4}
    assert_given(launched.pop(), kernels_cuda.DecodeAttention, **given)

    qkv, (cosines, sines) = torch.zeros(3, 5, heads, 3 * dim).half(), torch.zeros(2, 3, 5, 1, 2, dim // 2).half()
    queries = kernels_cuda.split_rotate(qkv, cosines, sines, keys, values, 1)
    given = {"qkv": qkv, "cosines": cosines, "sines": sines, "H": heads, "D": dim, "R": 2}
    others = {"queries": queries, "keys": keys, "values": values, "B": 3, "S": 5, "T": 7, "place": 1}
    assert_given(launched.pop(), kernels_cuda.SplitRotate, **given, **others)
    y = kernels_cuda.rotate(qkv, cosines, sines, back=True)
    assert_given(launched.pop(), kernels_cuda.Rotate, **given, y=y, sign=-1.0, tokens=15)
    assert not launched


def test_what_is_launched_on_hopper(launched):
    weight, scale = torch.zeros(64, 256, dtype=torch.int8), torch.zeros(64).half()
    x = torch.zeros(2, 20, 256).half()
    assert kernels_cuda.product(x, weight, scale).shape == (2, 20, 64)
    assert kernels_cuda.product(x[:, :8], weight, scale, residual=torch.zeros(2, 8, 64).half()).shape == (2, 8, 64)
    # Hopper's own kernels take no norm, so that is computed before.
    assert not kernels_cuda.takes_norm(x[:, :8], weight, 8)
    kernels_cuda.norm_linear(x[:, :2], scale.repeat(4), scale.repeat(4), 1e-5, weight, scale)
    names = ["linear_large_m_8_64_1", "linear_small_m_8_16_2", "prompt", "linear_small_m_8_8_2"]
    assert [launch[:2] for launch in launched] == list(
        zip(names, ["linear_large_m", "linear_small_m", "layer_norm", "linear_small_m"], strict=True)
    )


def test_compiled_modules_are_kept(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        cuda_runtime, "compile_module", lambda *given: compiled.append(given) or f"code {len(compiled)}".encode()
    )
    old, new = types.SimpleNamespace(version=(12, 9)), types.SimpleNamespace(version=(13, 0))
    assert cuda_runtime.module_code(old, MODULES["linear_m1_8"], False, 90) == b"code 1"
    assert cuda_runtime.module_code(old, MODULES["linear_m1_8"], False, 90) == b"code 1"
    for other in (
        (new, MODULES["linear_m1_8"], False, 90),
        (old, MODULES["prompt"], False, 90),
        (old, MODULES["linear_m1_8"], True, 90),
        (old, MODULES["linear_m1_8"], False, 80),
    ):
        assert cuda_runtime.module_code(*other) == f"code {len(compiled)}".encode()
    assert len(compiled) == 5
    monkeypatch.setitem(cuda_runtime.SOURCES, "kernels/cuda/linear_m1.cuh", "changed")
    assert cuda_runtime.module_code(old, MODULES["linear_m1_8"], False, 90) == b"code 6"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made there
    assert cuda_runtime.module_code(old, MODULES["linear_m1_8"], False, 90) == b"code 7"


# --- On a GPU ---

SHAPES = [(4096, 4096), (256, 16384), (200, 4096), (17, 64), (96, 160), (33, 48), (130, 250), (1000, 1056)]


def problem(bits, dtype, n, k, seed=0):
    torch.manual_seed(seed)
    weight = torch.randint(-128, 128, (n, k * bits // 8), dtype=torch.int8, device="cuda")
    scale = (torch.rand(n, device="cuda") * 1e-3 + 1e-4).to(dtype)
    bias = torch.randn(n, device="cuda").to(dtype)
    return weight, scale, bias, dequantize_weight(weight, scale.double(), bits, torch.float64)


def poison():
    """Fills what the allocator hands out next with NaN, so that an unwritten result is seen."""
    del [torch.full((size,), torch.nan, device="cuda") for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24)][:]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("n", "k"), SHAPES)
class TestProducts:
    pytestmark = on_gpu

    def test_against_float64(self, n, k, bits, dtype):
        weight, scale, bias, exact = problem(bits, dtype, n, k)
        for m in (1, 2, 3, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 130, 300):
            x = torch.randn(m, k, device="cuda").to(dtype)
            expected = x.double() @ exact.T + bias.double()
            plain = x @ dequantize_weight(weight, scale, bits, dtype).T + bias
            poison()
            got = kernels_cuda.product(x, weight, scale, bias, bits)
            assert distance(got, expected) < max(TOLERANCE[dtype], 1.05 * distance(plain, expected)), m
            assert torch.equal(got, kernels_cuda.product(x, weight, scale, bias, bits))  # no races
            bare = kernels_cuda.product(x, weight, scale, None, bits)
            assert distance(bare, expected - bias.double()) < 2 * TOLERANCE[dtype]

    @pytest.mark.parametrize("widths", [(), (8, 16)])
    def test_ways_of_older_devices(self, widths, n, k, bits, dtype, monkeypatch):
        weight, scale, bias, exact = problem(bits, dtype, n, k)
        monkeypatch.setattr(cuda_plans, "M16_TILES", widths)
        monkeypatch.setattr(kernels_cuda, "linear_plan", cuda_plans.linear_plan.__wrapped__)
        monkeypatch.setattr(kernels_cuda, "_suits_hopper", lambda *given: False)
        for m in (2, 8, 9, 16) if widths else (2, 8, 9, 32, 33, 65, 128, 130):
            x = torch.randn(m, k, device="cuda").to(dtype)
            poison()
            got = kernels_cuda.product(x, weight, scale, bias, bits)
            assert distance(got, x.double() @ exact.T + bias.double()) < 2 * TOLERANCE[dtype], m

    def test_what_follows_the_product(self, n, k, bits, dtype):
        weight, scale, bias, exact = problem(bits, dtype, n, k)
        for m in (1, 4, 16, 24, 130):
            x, residual = torch.randn(m, k, device="cuda").to(dtype), torch.randn(m, n, device="cuda").to(dtype)
            expected = x.double() @ exact.T + bias.double()
            got = kernels_cuda.product(x, weight, scale, bias, bits, residual=residual, alpha=7.5)
            assert distance(got, expected + 7.5 * residual.double()) < 2 * TOLERANCE[dtype]
            wide = 100 * torch.randn(m, n, device="cuda")
            poison()
            got = kernels_cuda.product(x, weight, scale, bias, bits, residual=wide, alpha=7.5)
            assert got.dtype == torch.float32
            assert distance(got - 7.5 * wide, expected) < 2 * TOLERANCE[dtype]
            got = kernels_cuda.product(x, weight, scale, bias, bits, gelu=True)
            assert distance(got, torch.nn.functional.gelu(expected, approximate="tanh")) < 4 * TOLERANCE[dtype]

    def test_input_gradient(self, n, k, bits, dtype):
        weight, scale, _, exact = problem(bits, dtype, n, k)
        for m in (5, 130):
            grad_y = torch.randn(m, n, device="cuda").to(dtype)
            poison()
            got = kernels_cuda.input_gradient(grad_y, weight, scale, bits)
            assert distance(got, grad_y.double() @ exact) < 2 * TOLERANCE[dtype]


on_hopper = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("split", cuda_plans.SMALL_M_SPLITS)
@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=on_hopper) for tokens in cuda_plans.SMALL_M_TILES])
def test_every_shape_of_block_of_few_rows_on_hopper(tokens, split, dtype, monkeypatch):
    monkeypatch.setattr(kernels_cuda, "_hopper_launch", kernels_cuda._hopper_launch.__wrapped__)
    for stages in (2, 3, 8):  # rings that turn often, too
        for m, n, k in ((tokens, 256, 4096), (tokens - 3, 448, 2080), (2, 136, 1056), (tokens // 2, 8, 192)):
            for bits in (8, 4):
                shared = cuda_plans.small_m_bytes(tokens, split, stages, 2048 * bits)
                shape = (tokens, split, stages, shared)
                monkeypatch.setattr(cuda_plans, "small_m_shape", lambda *given, shape=shape: shape)
                weight, scale, bias, exact = problem(bits, dtype, n, k)
                x, residual = torch.randn(m, k, device="cuda").to(dtype), torch.randn(m, n, device="cuda").to(dtype)
                expected = x.double() @ exact.T + bias.double()
                poison()
                got = kernels_cuda.product(x, weight, scale, bias, bits, residual=residual, alpha=7.5)
                assert distance(got, expected + 7.5 * residual.double()) < 2 * TOLERANCE[dtype]
                got = kernels_cuda.product(x, weight, scale, bias, bits, gelu=True)
                assert distance(got, torch.nn.functional.gelu(expected, approximate="tanh")) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("split", cuda_plans.LARGE_M_SPLITS)
@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=on_hopper) for tokens in cuda_plans.LARGE_M_STAGES])
def test_every_shape_of_block_on_hopper(tokens, split, dtype, monkeypatch):
    monkeypatch.setattr(kernels_cuda, "_hopper_launch", kernels_cuda._hopper_launch.__wrapped__)
    monkeypatch.setattr(cuda_plans, "large_m_shape", lambda *given: (tokens, split))
    monkeypatch.setattr(kernels_cuda, "MAX_SMALL_M", 0)
    # The last has blocks that take several tiles, one after the other.
    shapes = ((130, 256, 128), (300, 1024, 4096), (512, 448, 2080), (37, 192, 1056), (1, 128, 160), (4200, 1152, 448))
    for m, n, k in shapes:
        for bits in (8, 4):
            weight, scale, bias, exact = problem(bits, dtype, n, k)
            x, residual = torch.randn(m, k, device="cuda").to(dtype), torch.randn(m, n, device="cuda").to(dtype)
            expected = x.double() @ exact.T + bias.double()
            poison()
            got = kernels_cuda.product(x, weight, scale, bias, bits)
            assert distance(got, expected) < TOLERANCE[dtype]
            got = kernels_cuda.product(x, weight, scale, bias, bits, residual=residual, alpha=7.5)
            assert distance(got, expected + 7.5 * residual.double()) < 2 * TOLERANCE[dtype]
            wide = residual.float() * 100
            got = kernels_cuda.product(x, weight, scale, bias, bits, residual=wide, alpha=7.5)
            assert distance(got - 7.5 * wide, expected) < 2 * TOLERANCE[dtype]
            got = kernels_cuda.product(x, weight, scale, bias, bits, gelu=True)
            assert distance(got, torch.nn.functional.gelu(expected, approximate="tanh")) < 4 * TOLERANCE[dtype]
        weight, scale, _, exact = problem(8, dtype, n, k)
        grad_y = torch.randn(m, n, device="cuda").to(dtype)
        poison()
        got = kernels_cuda.input_gradient(grad_y, weight, scale, 8)
        assert distance(got, grad_y.double() @ exact) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
class TestOperations:
    pytestmark = on_gpu

    def test_head(self, dtype):
        weight = torch.randn(1000, 4096, device="cuda").to(dtype)
        x = torch.randn(1, 4096, device="cuda").to(dtype)
        got = kernels_cuda.product(x, weight, None, bits=16)
        assert distance(got, x.double() @ weight.double().T) < TOLERANCE[dtype]

    @pytest.mark.parametrize("k", [64, 192, 4096, 16384])
    def test_layer_norm(self, k, dtype):
        x = (torch.randn(3, k, device="cuda") * 3 + 1).to(dtype)
        weight, bias = torch.randn(2, k, device="cuda").to(dtype)
        expected = torch.nn.functional.layer_norm(x.double(), (k,), weight.double(), bias.double(), 1e-5)
        assert distance(kernels_cuda.layer_norm(x, weight, bias, 1e-5), expected) < TOLERANCE[dtype]

    @pytest.mark.parametrize("weight_dtype", [torch.float32, None])
    @pytest.mark.parametrize("x_dtype", [torch.float32, None])
    @pytest.mark.parametrize("k", [8, 200, 4096, 4104, 8192, 16384])
    def test_norm_in_training(self, k, x_dtype, weight_dtype, dtype):
        x = (torch.randn(5, 3, k, device="cuda") * 3 + 20).to(x_dtype or dtype)
        weight, bias = torch.randn(2, k, device="cuda").to(weight_dtype or dtype)
        exact = x.double().requires_grad_()
        expected = torch.nn.functional.layer_norm(exact, (k,), weight.double(), bias.double(), 1e-5)
        poison()
        normed, rounded = kernels_cuda.training_norm(x, weight, bias, 1e-5, dtype)
        assert distance(normed, expected) < 2e-6
        assert torch.equal(rounded, normed.to(dtype))
        odd = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view_as(x).copy_(x)
        assert torch.equal(kernels_cuda.training_norm(odd, weight, bias, 1e-5, dtype)[0], normed)
        grads = torch.randn_like(normed), torch.randn_like(rounded)
        expected.backward(grads[0].double() + grads[1].double())
        poison()
        got = kernels_cuda.training_norm_gradient(x, weight, 1e-5, *grads)
        assert got.dtype == x.dtype
        assert distance(got, exact.grad) < (2e-6 if x.dtype == torch.float32 else TOLERANCE[dtype])

    @pytest.mark.parametrize(("n", "k"), [(256, 4096), (40, 1024), (100, 192)])
    def test_a_norm_that_is_left_to_the_product(self, n, k, dtype, monkeypatch):
        monkeypatch.setattr(kernels_cuda, "_suits_hopper", lambda *given: False)  # it has none that take norms
        weight, scale, bias, exact = problem(8, dtype, n, k)
        norm_weight, norm_bias = torch.randn(2, k, device="cuda").to(dtype)
        rows = torch.empty(32, k, device="cuda", dtype=dtype)
        taken = [m for m in range(1, 33) if kernels_cuda.takes_norm(rows[:m], weight, 8)]
        assert set(taken) >= ({1, 2, 16} if k % 128 == 0 else {1})
        for m in taken:
            x = (torch.randn(m, k, device="cuda") * 3 + 1).to(dtype)
            exact_norm = torch.nn.functional.layer_norm(
                x.double(), (k,), norm_weight.double(), norm_bias.double(), 1e-5
            )
            poison()
            normed, got = kernels_cuda.norm_linear(x, norm_weight, norm_bias, 1e-5, weight, scale, bias, 8)
            assert distance(normed, exact_norm) < TOLERANCE[dtype], m
            assert distance(got, normed.double() @ exact.T + bias.double()) < TOLERANCE[dtype], m

    @pytest.mark.parametrize(
        ("head_dim", "heads", "batch", "length", "prefix", "most"),
        [
            (128, 32, 1, 300, 0, 8),
            (128, 32, 3, 1, 0, 4),
            (128, 32, 9, 300, 0, 1),
            (16, 4, 4, 37, 8, 3),
            (32, 6, 2, 100, 0, 1),
            (64, 5, 2, 515, 0, 6),
        ],
    )
    def test_step(self, head_dim, heads, batch, length, prefix, most, dtype):
        """Embedding, rotation, attention over a cache and its new key."""
        torch.manual_seed(0)
        ids, table = torch.randint(0, 50, (batch,), device="cuda"), torch.randn(50, 64, device="cuda").to(dtype)
        positions = torch.randint(0, 2000, (batch, 2), device="cuda")
        padding = (torch.arange(batch, device="cuda") % max(1, length // 3)).int()
        frequencies = (1 / 10000 ** (torch.arange(0, head_dim // 2, 2, device="cuda") / (head_dim // 2))).half().float()
        hidden, cosines, sines = kernels_cuda.begin_step(ids, table, positions, frequencies, head_dim)
        assert torch.equal(hidden, table[ids])
        angles = rotary_embedding(positions[..., None], head_dim, dtype)
        for got, expected in zip((cosines, sines), angles, strict=True):
            assert (got - expected.float().flatten(1)).abs().max() < 2 * TOLERANCE[dtype]

        slots = (length - torch.arange(batch, device="cuda")).clamp(min=0).int()
        caches = torch.randn(2, batch, heads, length + 9, head_dim, device="cuda").to(dtype)
        for row, slot in enumerate(slots.tolist()):
            caches[:, row, :, slot:] = torch.nan
        qkv = torch.randn(batch, heads * 3 * head_dim, device="cuda").to(dtype)
        query, key, value = qkv.view(batch, 1, heads, -1).chunk(3, dim=-1)
        query, key = (apply_rotary(x.double(), *(angle.double() for angle in angles)) for x in (query, key))
        before = caches.clone()
        got = kernels_cuda.attend(qkv, cosines, sines, *caches, slots, padding, prefix, 2, most)
        again = kernels_cuda.attend(qkv, cosines, sines, *caches, slots, padding, prefix, 2, most)
        assert torch.equal(got, again)
        roomy = torch.cat((caches, torch.full_like(caches, torch.nan).repeat(1, 1, 1, 9, 1)), dim=3)
        assert torch.equal(got, kernels_cuda.attend(qkv, cosines, sines, *roomy, slots, padding, prefix, 2, most))
        for row, slot in enumerate(slots.tolist()):
            assert distance(caches[0, row, :, slot], key[row, 0]) < TOLERANCE[dtype]
            assert torch.equal(caches[1, row, :, slot], value[row, 0])
            keys, values = caches[:, row, :, : slot + 1].double()
            assert torch.equal(keys[:, :slot], before[0, row, :, :slot].double())
            assert torch.equal(values[:, :slot], before[1, row, :, :slot].double())
            keys[:, slot] = key[row, 0]
            places = torch.arange(slot + 1, device="cuda")
            seen = (places < prefix) | (places >= prefix + padding[row])
            scores = query[row].transpose(0, 1) @ keys.transpose(1, 2) / head_dim**0.5
            probs = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
            expected = (probs @ values).flatten()
            assert distance(got[row], expected) < 4 * TOLERANCE[dtype]  # query and key are rounded, too

        after = slots + 1
        kernels_cuda.end_step(hidden, positions, torch.ones_like(positions), slots, head_dim)
        assert torch.equal(slots, after)

    @pytest.mark.parametrize(("head_dim", "rows"), [(128, 2), (16, 2), (32, 1)])
    def test_split_rotate(self, head_dim, rows, dtype):
        batch, length, heads = 2, 7, 3
        qkv = torch.randn(batch, length, heads, 3 * head_dim, device="cuda").to(dtype)
        angles = rotary_embedding(torch.randint(0, 2000, (batch, rows, length), device="cuda"), head_dim, dtype)
        keys, values = torch.zeros(2, batch, heads, 12, head_dim, dtype=dtype, device="cuda")
        got = kernels_cuda.split_rotate(qkv, *angles, keys, values, 2)
        query, key, value = qkv.chunk(3, dim=-1)
        exact = [angle.double() for angle in angles]
        assert distance(got, apply_rotary(query.double(), *exact).transpose(1, 2)) < TOLERANCE[dtype]
        assert distance(keys[:, :, 2:9], apply_rotary(key.double(), *exact).transpose(1, 2)) < TOLERANCE[dtype]
        assert torch.equal(values[:, :, 2:9], value.transpose(1, 2))
        assert not keys[:, :, :2].any()
        assert not keys[:, :, 9:].any()

    @pytest.mark.parametrize(("head_dim", "rows"), [(128, 2), (64, 2), (32, 1)])
    def test_rotation_and_its_gradients(self, head_dim, rows, dtype):
        batch, length, heads = 2, 7, 3
        qkv = torch.randn(batch, length, heads, 3 * head_dim, device="cuda", requires_grad=True).to(dtype)
        qkv.retain_grad()
        angles = rotary_embedding(torch.randint(0, 2000, (batch, rows, length), device="cuda"), head_dim, dtype)
        got = rotate(torch.nn.Identity(), qkv, *angles)
        upstream = torch.randn_like(got)
        got.backward(upstream)

        same = qkv.detach().double().requires_grad_()
        query, key, value = same.chunk(3, dim=-1)
        exact = [angle.double() for angle in angles]
        expected = torch.cat((apply_rotary(query, *exact), apply_rotary(key, *exact), value), dim=-1)
        expected.backward(upstream.double())
        assert distance(got, expected) < TOLERANCE[dtype]
        assert distance(qkv.grad, same.grad) < TOLERANCE[dtype]

    def test_what_is_not_rotated(self, dtype):
        angles = torch.zeros(1, 2, 1, 2, 8, device="cuda", dtype=dtype)
        qkv = torch.zeros(1, 2, 3, 48, device="cuda", dtype=dtype)
        made_by = torch.nn.Identity()
        assert rotate(made_by, qkv, angles, angles) is None  # parts of 8
        qkv, angles = qkv.repeat(1, 1, 1, 2), angles.repeat(1, 1, 1, 1, 2)
        assert rotate(made_by, qkv, angles, angles) is not None
        assert rotate(made_by, qkv, angles.float(), angles) is None
        assert rotate(made_by, qkv.float(), angles.float(), angles.float()) is None
