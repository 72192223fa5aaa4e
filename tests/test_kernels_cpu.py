"""The compiled CPU kernels: their numbers at every instruction level of this machine, and how they come to be compiled.

Letters: M rows of an activation, K in_features, N out_features; B batch, H heads, T keys, D head dimension.
"""

import contextlib
import copy
import importlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from chatglm_int8 import ChatGLMForConditionalGeneration, cuda_graphs, kernel_cache, kernels_cpu, quantization
from chatglm_int8.cuda_graphs import GrowingLayer
from chatglm_int8.kernels_cpu import FLAGS, OPENMP, WITHOUT_AMX, Library
from chatglm_int8.modeling_chatglm import apply_rotary, rotary_embedding
from chatglm_int8.quantization import HalfEmbedding, HalfLinear, QuantizedLinear, pack_int4, unpack_int4

# Half a unit in the last place of 1: the relative error of one rounding.
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
DTYPES = list(ROUNDING)
HALVES = [torch.float16, torch.bfloat16]
# What splitting a row into integers may leave of a number, over the row's largest: int16 digits leave 2^-16, two int8
# digits (127 · 248 steps) less than 2^-15; of float32 numbers one digit more leaves less than float32 itself does.
LEFT_OVER = {torch.float32: 2**-23, torch.float16: 2**-15, torch.bfloat16: 2**-15}
TINY = 2**-120  # activations below this may count as zero
FLOAT_BAR = 1e-5  # relative Frobenius error of float32 activations
HALF_BAR = 3  # the same of half activations, over that of rounding exact activations to float16

CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
DRIVER = Path(__file__).with_name("kernels_cpu_driver.c")
SOURCE = Path(__file__).parent.parent / "kernels" / "cpu" / "kernels.c"
IS_X86 = platform.machine() in ("x86_64", "AMD64")
IS_ARM = platform.machine() in ("aarch64", "arm64")
GCC = shutil.which("gcc")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")
needs_gcc = pytest.mark.skipif(GCC is None, reason="needs gcc")


def levels() -> dict[str, tuple[str, ...]]:
    """Names of instruction levels that this machine can run, and the flags that force them."""
    found = {"native": ()}
    if "avx512_vnni" in CPU:
        if "AuthenticAMD" not in CPU:
            found["as on AMD"] = (*WITHOUT_AMX, "-DON_AMD=1")
        if "AuthenticAMD" in CPU or "amx_int8" in CPU:
            found["as on no AMD"] = (*WITHOUT_AMX, "-DON_AMD=0")
        found["no VNNI"] = (*WITHOUT_AMX, "-mno-avx512vnni")
    if "avx_vnni" in CPU:
        found["AVX2 with VNNI"] = ("-march=x86-64-v3", "-mavxvnni")
    if all(f" {name} " in CPU for name in ("avx2", "fma", "f16c")) and ("avx512bw" in CPU or "avx_vnni" in CPU):
        found["AVX2"] = ("-march=x86-64-v3",)
    if IS_X86:
        found["portable C"] = ("-march=x86-64",)
    if "amx_int8" not in CPU:
        found["AMX emulated"] = ("-DEMULATE_AMX",)
    if IS_ARM:
        found["NEON"] = ("-march=armv8-a",)
    return found


LEVELS = levels()
EXPECTED = {
    "AMX emulated": "AMX",
    "as on AMD": "AVX512 with VNNI",
    "as on no AMD": "AVX512 with VNNI",
    "no VNNI": "AVX512",
    "AVX2 with VNNI": "AVX2 with VNNI",
    "AVX2": "AVX2",
    "portable C": "portable C",
    "NEON": "NEON",
}


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """A function that compiles a level, once a session."""
    made = {}

    def make(level: str) -> Library:
        if level not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernel_cache, "cache_folder", lambda: tmp_path_factory.getbasetemp())
                made[level] = Library(kernels_cpu.build((*FLAGS, OPENMP, *LEVELS[level])))
        if not made[level].allowed:
            pytest.skip("the operating system refuses the matrix unit")
        return made[level]

    return make


@pytest.fixture(params=LEVELS)
def linear_kernels(request, libraries) -> Library:
    return libraries(request.param)


@pytest.fixture(params=[level for level in LEVELS if level != "AMX emulated"])  # it is slow, and only linears differ
def kernels(request, libraries) -> Library:
    return libraries(request.param)


pytestmark = needs_compiler


@contextlib.contextmanager
def poisoned():
    """Fresh tensors hold NaN, so that a number which no kernel wrote is seen."""
    empty = torch.empty

    def full_of_nan(*size, **kwargs):
        tensor = empty(*size, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", full_of_nan)
        yield


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, outliers: bool = False) -> torch.Tensor:
    """Float64 normal numbers; with `outliers`, one in a hundred is 30 times as large, as in the model."""
    x = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return torch.where(torch.rand(shape, generator=generator(seed + 1)) < 0.01, x * 30, x) if outliers else x


def make_weight(n: int, k: int, bits: int, seed: int = 5) -> torch.Tensor:
    """Stored integers of their whole range, -128 and -8 too."""
    limit = 2 ** (bits - 1)
    integers = torch.randint(-limit, limit, (n, k), generator=generator(seed)).to(torch.int8)
    return pack_int4(integers) if bits == 4 else integers


def reference(x, weight, scale, bias, bits):
    """y, Σ|x·w| and Σ|w|, all in float64."""
    w = (unpack_int4(weight) if bits == 4 else weight).double() * scale.double()[:, None]
    y = x.double() @ w.T
    return (y if bias is None else y + bias.double()), x.double().abs() @ w.abs().T, w.abs().sum(dim=1)


def check(library, x, weight, scale, bias=None, bits=8, threads=1):
    """Compare with float64, number by number. Returns y and the exact y."""
    with poisoned():
        y = library.linear(x, weight, scale, bias, bits, threads)
    assert y.dtype == x.dtype
    assert y.shape == (x.shape[0], weight.shape[0])
    exact, size, weights = reference(x, weight, scale, bias, bits)
    largest = x.double().abs().amax(dim=1, keepdim=True)
    # Sums in float32 err with the root of their length.
    bound = size * (8 + x.shape[1] ** 0.5) * ROUNDING[torch.float32]
    bound = bound + (exact.abs() * 1.01 + 2 * size * ROUNDING[torch.float32]) * ROUNDING[x.dtype]
    bound = bound + (LEFT_OVER[x.dtype] * largest + TINY) * weights
    if bias is not None:
        bound = bound + bias.double().abs() * 2 * ROUNDING[torch.float32]
    smallest = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps  # the subnormal step
    worst = ((y.double() - exact).abs() - bound).max().item() if y.numel() else 0.0
    assert worst <= smallest, f"{worst:.3e} beyond the bound"
    return y, exact


def frobenius(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def half_error() -> float:
    """Relative Frobenius error of a product whose activations, normal numbers with outliers, are rounded to float16."""
    x, w = normal(64, 4096, outliers=True), normal(64, 4096, seed=7)
    error = frobenius(x.half().double() @ w.T, x @ w.T)
    assert 2**-13 < error < 2**-11.5
    return error


# Linear layers


@pytest.mark.parametrize("level", LEVELS)
def test_the_flags_force_the_level(level, libraries):
    if level == "native":
        assert libraries(level).instructions in (set(EXPECTED.values()) | {"AMX", "NEON with dot product"})
    else:
        assert libraries(level).instructions == EXPECTED[level]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("m", [1, 2, 3, 7, 16, 33, 128])
def test_linear_is_as_exact_as_its_dtype(linear_kernels, bits, dtype, m, half_error):
    """Also with K of two blocks and a tail, and N of no round number."""
    n, k = 133, 4160 + 8
    x = normal(m, k, seed=m, outliers=True).to(dtype)
    weight, scale = make_weight(n, k, bits), (1 + torch.rand(n, generator=generator(3))) / 2 ** (bits - 1)
    y, exact = check(linear_kernels, x, weight, scale, normal(n, seed=9).float(), bits)
    bar = FLOAT_BAR if dtype == torch.float32 else HALF_BAR * half_error + frobenius(exact.to(dtype), exact)
    assert frobenius(y, exact) <= bar


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("k", [1, 2, 15, 16, 30, 64, 66, 127, 360, 1024, 2048, 2050, 4096, 5000])
def test_linear_of_any_shape(linear_kernels, bits, k):
    if bits == 4 and k % 2:
        pytest.skip("INT4 has two columns a byte")
    for case, n in enumerate((1, 5, 33, 130) if k < 2000 else (5, 33)):
        for m in (1, 2, 7, 17):
            dtype = DTYPES[(case + m) % 3]
            x = normal(m, k, seed=m).to(dtype)
            check(linear_kernels, x, make_weight(n, k, bits), torch.rand(n, generator=generator(n)), bits=bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_linear_of_more_rows_than_are_split_at_once(linear_kernels, bits):
    for dtype in DTYPES:
        x = normal(1030, 130, seed=1, outliers=True).to(dtype)
        check(
            linear_kernels, x, make_weight(37, 130, bits), torch.rand(37, generator=generator(2)), bits=bits, threads=2
        )


@pytest.mark.parametrize("m", [1, 5])
def test_scale_and_bias_have_dtypes_of_their_own(kernels, m):
    for dtype in DTYPES:
        for scale_dtype in DTYPES:
            for bias_dtype in (*DTYPES, None):
                bias = None if bias_dtype is None else normal(21, seed=2).to(bias_dtype)
                scale = torch.rand(21, generator=generator(4)).to(scale_dtype)
                check(kernels, normal(m, 70).to(dtype), make_weight(21, 70, 8), scale, bias)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads_change_nothing(linear_kernels, threads):
    """Also more threads than there are features or tiles of them."""
    for n in (1, 3, 40, 300):
        for m in (1, 2, 40):
            for bits in (8, 4):
                x, weight = normal(m, 200, outliers=True).half(), make_weight(n, 200, bits)
                y, _ = check(linear_kernels, x, weight, torch.ones(n), bits=bits, threads=threads)
                assert torch.equal(y, linear_kernels.linear(x, weight, torch.ones(n), None, bits, 1))


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_independent(linear_kernels, bits):
    """A row among others gives the same, whatever the others hold and wherever it stands."""
    weight, scale = make_weight(40, 360, bits), torch.ones(40)
    for dtype in DTYPES:
        x = normal(33, 360, outliers=True).to(dtype)
        y = linear_kernels.linear(x, weight, scale, None, bits)
        assert torch.equal(linear_kernels.linear(x.flip(0), weight, scale, None, bits).flip(0), y)
        assert torch.equal(linear_kernels.linear(x[4:7], weight, scale, None, bits), y[4:7])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_their_number(linear_kernels, dtype):
    """Two rows and more, also where their number decides how weights are read and multiplied."""
    for n, k in ((70, 64), (70, 1088)):
        weight, scale, x = make_weight(n, k, 8), torch.rand(n, generator=generator(2)), normal(40, k).to(dtype)
        y, _ = check(linear_kernels, x, weight, scale)
        for m in (2, 5, 6, 8, 9, 10, 11, 16, 17, 32, 33):
            assert torch.equal(linear_kernels.linear(x[:m], weight, scale, None, 8, threads=m % 2 + 1), y[:m]), (k, m)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_stay_in_their_row(linear_kernels, bits, number):
    weight, scale, bias = make_weight(7, 2200, bits), torch.ones(7), normal(7).float()
    for dtype in DTYPES:
        for m in (1, 2, 20):
            for at in (0, 1999, 2199):
                x = normal(m, 2200).to(dtype)
                expected = linear_kernels.linear(x, weight, scale, bias, bits)
                x[m // 2, at] = number
                with poisoned():
                    y = linear_kernels.linear(x, weight, scale, bias, bits)
                others = torch.arange(m) != m // 2
                assert torch.equal(y[others], expected[others])
                integers = unpack_int4(weight) if bits == 4 else weight
                # Infinity times a weight of zero is NaN; nothing finite may come of the others.
                assert not y[m // 2].isfinite().any(), (dtype, m, at, integers[:, at][y[m // 2].isfinite()])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("m", [1, 2, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scales(linear_kernels, bits, m, dtype):
    """Rows of zeros, the smallest and the largest numbers of a dtype, all in one activation."""
    info = torch.finfo(dtype)
    largest, smallest = info.max / 2**14, info.smallest_normal * info.eps  # the smallest subnormal number
    sizes = [1.0, 0.0, smallest, info.smallest_normal, 2.0**-10, largest, 1e-30, 1e30, 1e4]
    sizes += [2.0**-45, 2.0**-55, 2.0**-59]
    weight, scale = make_weight(9, 2100, bits), torch.full((9,), 2.0**-7)
    for shift in range(0, len(sizes), m):
        x = normal(m, 2100)
        x = x * torch.tensor([sizes[(shift + i) % len(sizes)] for i in range(m)])[:, None]
        x = x.clamp(-largest, largest).to(dtype)
        if dtype == torch.float32:
            # Subnormal float32 numbers may be taken for zero: below 2^-126 a processor may do so by itself.
            x[x.abs() < info.smallest_normal] = 0
        check(linear_kernels, x, weight, scale, bits=bits)


def test_subnormal_float32_numbers_give_nothing_large(kernels):
    x = torch.full((3, 64), 1e-42)
    x[1] = 1.0
    y = kernels.linear(x, torch.full((5, 64), 127, dtype=torch.int8), torch.ones(5), None, 8)
    assert (y[[0, 2]].abs() < 1e-36).all()
    torch.testing.assert_close(y[1], torch.full((5,), 64.0 * 127), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_outlier_beside_small_numbers(kernels, dtype):
    """Exact to the outlier's resolution, and where the outlier meets a weight of zero, to that of the small numbers:
    in float32 activations."""
    x = normal(20, 512).to(dtype)
    x[:, 77] = 1e4
    weight, scale = make_weight(33, 512, 8), torch.full((33,), 2.0**-8)
    check(kernels, x, weight, scale)
    weight[:, 77] = 0
    y, exact = check(kernels, x, weight, scale)
    if dtype == torch.float32:
        assert frobenius(y, exact) < 1e4 * LEFT_OVER[dtype]
    check(kernels, x[:1], weight, scale)


@pytest.mark.parametrize("value", [127, -127, -128, 0])
def test_weights_at_their_edges(linear_kernels, value):
    """Integer sums must not overflow: weights and activations at their largest, of one sign, in several blocks."""
    weight = torch.full((5, 5000), value, dtype=torch.int8)
    for dtype in DTYPES:
        for m in (1, 2, 20):
            for sign in (1, -1):
                x = torch.full((m, 5000), sign * 3.0, dtype=dtype)
                y, _ = check(linear_kernels, x, weight, torch.full((5,), 2.0**-10))
                assert torch.equal(y, y[:1, :1].expand_as(y))
    nibbles = torch.full((5, 2500), {127: 0x77, -127: 0x99 - 256, -128: 0x88 - 256, 0: 0}[value], dtype=torch.int8)
    for m in (1, 20):
        check(linear_kernels, torch.full((m, 5000), 3.0), nibbles, torch.full((5,), 2.0**-10), bits=4)


def test_int4_columns_are_in_order(linear_kernels):
    """One activation at a time meets each column."""
    weight = make_weight(3, 130, 4)
    for m in (130, 1):
        for k in range(0, 130, m):
            y = linear_kernels.linear(torch.eye(130)[k : k + m], weight, torch.ones(3), None, 4)
            assert torch.allclose(y.T, unpack_int4(weight).float()[:, k : k + m], rtol=1e-6)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("dtype", HALVES)
def test_results_are_rounded_to_the_nearest(kernels, dtype, m):
    """Zeros plus a float32 bias give the bias in the activation's dtype: ties, subnormal numbers, overflow, NaN."""
    patterns = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()].float()
    between = (finite[:-1].double() + finite[1:].double()).div(2).float()
    special = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 65519.0, 65520.0, 3.4e38, 1e-45, -1e-8, 3e-8, 6e-8])
    bias = torch.cat((finite, between, between * (1 + 2**-20), between * (1 - 2**-20), special))
    weight, scale = torch.ones(len(bias), 2, dtype=torch.int8), torch.ones(len(bias))
    y = kernels.linear(torch.zeros(m, 2, dtype=dtype), weight, scale, bias, 8)
    torch.testing.assert_close(y, bias.to(dtype).expand(m, -1), rtol=0, atol=0, equal_nan=True)


def test_activations_need_not_be_contiguous(kernels):
    wide, weight = normal(12, 256).half(), make_weight(9, 128, 8)
    scale = torch.rand(18, generator=generator(1))[::2]
    for x in (wide[:, ::2], wide[::2, 128:], normal(128, 6).bfloat16().T, wide[:1, :128].expand(4, 128)):
        assert not x.is_contiguous()
        assert torch.equal(
            kernels.linear(x, weight, scale, scale, 8),
            kernels.linear(x.contiguous(), weight, scale.contiguous(), scale.contiguous(), 8),
        )


def test_nothing_of_nothing(linear_kernels):
    for dtype in DTYPES:
        for m, n, k in ((0, 9, 64), (4, 0, 64), (4, 9, 0)):
            x, weight, bias = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=torch.int8), torch.arange(float(n))
            with poisoned():
                y = linear_kernels.linear(x, weight, torch.ones(n), bias, 8)
            assert y.shape == (m, n)
            assert torch.equal(y, bias.to(dtype).expand(m, n))


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.ones(2, 63)},
        {"x": torch.ones(2, 64, dtype=torch.float64)},
        {"weight": torch.ones(9, 64)},
        {"weight": torch.ones(64, 9, dtype=torch.int8).T},
        {"scale": torch.ones(8)},
        {"scale": torch.ones(9, dtype=torch.float64)},
        {"bias": torch.ones(9, 1)},
        {"bits": 4},
        {"x": torch.ones(2, 64, device="meta")},
    ],
)
def test_other_tensors_are_refused(libraries, change):
    given = {"x": torch.ones(2, 64), "weight": torch.ones(9, 64, dtype=torch.int8), "scale": torch.ones(9)}
    given |= {"bias": None, "bits": 8} | change
    with pytest.raises(ValueError, match="got torch"):
        libraries("native").linear(**given)


# Linear layers with half weights


@pytest.mark.parametrize("weight_dtype", HALVES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_half_linear(kernels, weight_dtype, dtype):
    for m in (1, 2, 3, 8, 33):
        for n, k in ((1, 1), (5, 15), (33, 64), (130, 360), (7, 4100)):
            x, weight = normal(m, k, seed=m, outliers=True).to(dtype), normal(n, k, seed=8).to(weight_dtype)
            with poisoned():
                y = kernels.half_linear(x, weight, threads=1 + m % 4)
            assert y.dtype == dtype
            exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
            bound = size * (8 + k**0.5) * ROUNDING[torch.float32] + exact.abs() * 1.01 * ROUNDING[dtype]
            assert ((y.double() - exact).abs() <= bound + 1e-30).all()


def test_half_linear_of_every_half_number(kernels):
    """One column meets the code for single numbers, 64 columns that for vectors."""
    for dtype in HALVES:
        numbers = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        for columns in (1, 64):
            weight = torch.zeros(2**16, columns, dtype=dtype)
            weight[torch.arange(2**16), torch.arange(2**16) % columns] = numbers
            y = kernels.half_linear(torch.ones(1, columns), weight)[:, :]
            torch.testing.assert_close(y[0], numbers.float(), rtol=0, atol=0, equal_nan=True)


def test_half_linear_keeps_nan_and_refuses_others(kernels):
    weight = torch.ones(4, 64, dtype=torch.float16)
    x = torch.ones(5, 64)
    x[2, 63] = torch.nan
    y = kernels.half_linear(x, weight)
    assert y[2].isnan().all()
    assert (y[[0, 1, 3, 4]] == 64).all()
    assert torch.equal(kernels.half_linear(torch.ones(64, 5).T, weight), torch.full((5, 4), 64.0))
    assert kernels.half_linear(torch.ones(0, 64), weight).shape == (0, 4)
    for other in (weight.float(), weight[:, :63], weight.T.contiguous().T, weight[0]):
        with pytest.raises(ValueError, match="half weight"):
            kernels.half_linear(x, other)


# Attention


def exact_attention(query, key, value, mask, scaling):
    scores = query.double() @ key.double().transpose(2, 3) * scaling
    probs = (scores if mask is None else scores + mask.double()).softmax(dim=-1)
    return (probs @ value.double()).transpose(1, 2), (probs @ value.double().abs()).transpose(1, 2)


def check_attention(library, query, key, value, mask, threads=1):
    scaling = query.shape[-1] ** -0.5
    with poisoned():
        context = library.attention(query, key, value, mask, scaling, threads)
    assert context.dtype == query.dtype
    assert context.is_contiguous()
    expected, size = exact_attention(query, key, value, mask, scaling)
    scores = (query.double().abs() @ key.double().abs().transpose(2, 3)).amax() * scaling
    # Errors of the scores, of their exponentials (2 units) and of two sums of T numbers; then one rounding.
    float_error = (4 * scores + 8 + key.shape[2] ** 0.5) * ROUNDING[torch.float32]
    bound = size * float_error + expected.abs() * 1.01 * ROUNDING[query.dtype]
    smallest = torch.finfo(query.dtype).smallest_normal
    assert ((context.double() - expected).abs() <= bound + smallest).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s", [1, 2, 8, 21])
@pytest.mark.parametrize("t", [1, 2, 15, 16, 17, 300, 2000])
def test_attention(kernels, dtype, s, t):
    for d in (16, 48, 80, 128, 256) if t < 2000 else (128,):
        query, key, value = (normal(2, 3, n, d, seed=i).to(dtype) for i, n in enumerate((s, t, t)))
        check_attention(kernels, query * 3, key, value, None, threads=1 + d % 5)
    mask = torch.zeros(2, 1, s, t, dtype=dtype)
    mask[0, ..., : t // 2] = torch.finfo(dtype).min
    mask[1, ..., t // 3 : t // 2] = -torch.inf
    mask[1, 0, s // 2, : t // 2] = 0.5  # not the same for all queries
    check_attention(kernels, query, key, value, mask)
    check_attention(kernels, query, key, value, mask[1:])  # for all sequences
    check_attention(kernels, query, key, value, mask[:, :, :1].expand(2, 1, s, t))  # for all queries


@pytest.mark.parametrize("s", [1, 9])
def test_attention_with_strides(kernels, s):
    """As the model calls it: queries cut from a product, keys and values views of buffers with room for more."""
    for dtype in DTYPES:
        qkv = normal(2, s, 4, 96).to(dtype)
        query = qkv[..., :32].transpose(1, 2)
        key, value = normal(2, 4, 300, 32, seed=1).to(dtype)[:, :, :77], normal(2, 77, 4, 32, seed=2).to(dtype)
        mask = normal(2, 1, s, 100, seed=3).to(dtype)[..., 20:97]
        check_attention(kernels, query, key, value.transpose(1, 2), mask, threads=3)
        check_attention(kernels, query[:1].expand(2, 4, s, 32), key[:1].expand(2, 4, 77, 32), key, mask)


@pytest.mark.parametrize("s", [1, 3])
def test_attention_to_one_key_among_many(kernels, s):
    """Large scores: no exponential overflows, and one key takes all."""
    query, key, value = torch.full((1, 1, s, 64), 40.0), normal(1, 1, 50, 64).float(), normal(1, 1, 50, 64).float() + 1
    key[0, 0, 7] = 40.0
    expected = value[0, :, 7].expand(s, 1, 64)
    assert torch.equal(kernels.attention(query, key, value, None, 1.0)[0], expected)
    assert torch.equal(kernels.attention(-query, -key, value, None, 1.0)[0], expected)


@pytest.mark.parametrize("s", [1, 3])
def test_attention_when_all_is_masked(kernels, s):
    """Of keys all masked with the smallest number, each counts the same, as in softmax."""
    query, key, value = (normal(1, 2, n, 32, seed=n).float() for n in (s, 20, 20))
    mask = torch.full((1, 1, s, 20), torch.finfo(torch.float32).min)
    context = kernels.attention(query * 1e-3, key, value, mask, 1.0)
    torch.testing.assert_close(context, value.mean(dim=2)[:, None].expand(1, s, 2, 32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("s", [1, 3])
def test_attention_hides_nothing_that_is_not_finite(kernels, where, number, s):
    for dtype in DTYPES:
        tensors = {name: normal(2, 2, s if name == "query" else 40, 32, seed=i).to(dtype).abs()
                   for i, name in enumerate(("query", "key", "value"))}  # fmt: skip
        expected = kernels.attention(**tensors, mask=None, scaling=0.1)
        tensors[where][1, 1, -1, 5] = number
        context = kernels.attention(**tensors, mask=None, scaling=0.1)
        touched = {"query": context[1, -1, 1], "key": context[1, :, 1], "value": context[1, :, 1, 5]}[where]
        assert not touched.isfinite().any()
        assert torch.equal(context[0], expected[0])
        assert torch.equal(context[1, :, 0], expected[1, :, 0])


def test_attention_refuses_other_tensors(libraries):
    library, good = libraries("native"), torch.ones(1, 2, 1, 32)
    for query, key, mask in (
        (torch.ones(1, 2, 2, 32), good, torch.zeros(1, 1, 1, 1)),
        (torch.ones(1, 2, 1, 24), torch.ones(1, 2, 1, 24), None),
        (torch.ones(1, 2, 1, 272), torch.ones(1, 2, 1, 272), None),
        (good, torch.ones(1, 1, 1, 32), None),
        (good, good.half(), None),
        (good, torch.ones(1, 2, 32, 1).transpose(2, 3), torch.ones(1, 1, 1, 2)),
        (good, torch.ones(1, 2, 1, 64)[..., ::2], None),
        (good, good, torch.zeros(1, 2, 1, 1)),
        (good, good, torch.zeros(1, 1, 1, 1, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match="got torch"):
            library.attention(query, key, key, mask, 1.0)


# Rotary positions and GELU


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parts", "d"), [(1, 16), (2, 16), (2, 36), (1, 2), (2, 128), (2, 256)])
def test_rotary(kernels, dtype, parts, d):
    positions = torch.randint(0, 2000, (2, parts, 5), generator=generator(1))
    for threads in (1, 3):
        qkv = normal(2, 5, 3, 3 * d).to(dtype)
        cosine, sine = rotary_embedding(positions, d, dtype)
        query, key, value = qkv.double().chunk(3, dim=-1)
        tables = cosine.double(), sine.double()
        expected = torch.cat((apply_rotary(query, *tables), apply_rotary(key, *tables), value), dim=-1)
        turned = kernels.rotary_(qkv, cosine, sine, threads)
        assert turned is qkv
        assert torch.equal(turned[..., 2 * d :].double(), value)
        bound = (expected.abs() + 1e-30) * ROUNDING[dtype] * 1.01 + 16 * ROUNDING[torch.float32]
        assert ((turned.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("d", [2, 16, 64])
def test_rotary_by_nothing_keeps_every_half_number(kernels, dtype, d):
    numbers = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers[~numbers.isfinite()] = 0
    qkv = numbers[: len(numbers) // (3 * d) * 3 * d].view(1, 1, -1, 3 * d).clone()
    ones = torch.ones(1, 1, 1, 1, d, dtype=dtype)
    assert torch.equal(kernels.rotary_(qkv.clone(), ones, torch.zeros_like(ones)), qkv)


def test_rotary_refuses_other_tensors(libraries):
    library, tables = libraries("native"), (torch.ones(1, 2, 1, 2, 16), torch.ones(1, 2, 1, 2, 16))
    for qkv in (
        torch.ones(1, 3, 4, 96),
        torch.ones(1, 2, 4, 96).half(),
        torch.ones(1, 2, 4, 192)[..., ::2],
        torch.ones(1, 2, 4, 95),
    ):
        with pytest.raises(ValueError, match="got torch"):
            library.rotary_(qkv, *tables)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(kernels, dtype):
    x = torch.cat((normal(4001, seed=1) * 3, torch.linspace(-12, 12, 3001, dtype=torch.float64))).to(dtype)
    # x · (1 + tanh(u/2)) / 2, but exact where 1 + tanh is small.
    u = (2 / torch.pi) ** 0.5 * 2 * (x.double() + 0.044715 * x.double() ** 3)
    expected = x.double() * u.sigmoid()
    torch.testing.assert_close(expected, nn.functional.gelu(x.double(), approximate="tanh"))
    for threads in (1, 4):
        y = kernels.gelu_(x.clone(), threads)
        # exp(-u) errs by some units of u, and by some of its own.
        bound = expected.abs() * ((16 + 6 * u.abs()) * ROUNDING[torch.float32] + 1.01 * ROUNDING[dtype])
        assert ((y.double() - expected).abs() <= bound + 16 * torch.finfo(dtype).smallest_normal).all()
    assert torch.equal(kernels.gelu_(x.clone().view(2, -1)).flatten(), y)
    assert kernels.gelu_(x[:0].clone()).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_of_extreme_numbers(kernels, dtype):
    largest = torch.finfo(dtype).max
    ordinary = [0.0, -0.0, 1e4, 50.0, 1e-7, -1e-7, -20.0, -50.0, -1e4]
    x = torch.tensor([*ordinary, torch.inf, torch.nan, largest, -largest / 4, -largest, -torch.inf], dtype=dtype)
    y = kernels.gelu_(x.clone())
    expected = nn.functional.gelu(x.double(), approximate="tanh").to(dtype)
    torch.testing.assert_close(y[:-1], expected[:-1], rtol=2**-6, atol=1e-30, equal_nan=True)
    assert y[-1] == 0 or y[-1].isnan()  # 0 is the limit; PyTorch says NaN


def test_gelu_refuses_other_tensors(libraries):
    for x in (torch.ones(4, dtype=torch.float64), torch.ones(4, 4).T[::2], torch.ones(3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="contiguous float"):
            libraries("native").gelu_(x)


# Compiling


@needs_gcc
@pytest.mark.skipif(not IS_X86, reason="levels of x86-64")
@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3", "skylake-avx512", "sapphirerapids"])
def test_the_source_has_no_warnings(level, openmp):
    if not openmp and level != "x86-64":
        pytest.skip("seen at the lowest level")
    command = [GCC, *FLAGS, f"-march={level}", "-S", SOURCE, "-o", "-", "-Wall", "-Wextra", "-Werror"]
    # Without OpenMP its pragmas are unknown, and the number of threads is not used.
    command += [OPENMP] if openmp else ["-Wno-unknown-pragmas", "-Wno-unused-parameter"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "bad value" in done.stderr:
        pytest.skip(f"this gcc does not know {level}")
    assert done.returncode == 0, done.stderr


def compile_driver(compiler: str, folder: Path, *flags: str) -> Path:
    program = folder / "driver"
    flags = ("-O1", "-g", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", *flags)
    done = subprocess.run([compiler, *flags, DRIVER, "-o", program, "-lm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@needs_gcc
@pytest.mark.parametrize("level", [level for level in LEVELS if level != "no VNNI"])
def test_sanitizers_find_nothing(level, tmp_path):
    """Addresses, and what C leaves undefined: overflow, shifts, alignment."""
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([GCC, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(found):
            pytest.skip(f"gcc has no {name}")
    flags = ("-march=native", *LEVELS[level], "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = compile_driver(GCC, tmp_path, *flags)
    environment = {"PATH": os.environ["PATH"], "ASAN_OPTIONS": "detect_leaks=0"}  # leaks are looked for with ptrace
    done = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode == 77:
        pytest.skip("the operating system refuses the matrix unit")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 wrong" in done.stdout
    assert not done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("march", "instructions"), [("armv8-a", "NEON"), ("armv8.2-a+dotprod", "NEON with dot product")]
)
def test_aarch64(march, instructions, tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user")
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter")
    program = compile_driver(compiler, tmp_path, f"-march={march}", *warnings)
    command = [emulator, "-L", "/usr/aarch64-linux-gnu", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{instructions}: 0 wrong\n"


# Compiling at load


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def write_script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def compiler(tmp_path):
    """A function that makes a compiler for CC: the machine's, in haste, after a few lines of shell."""
    real = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))

    def make(before: str = "") -> Path:
        return write_script(tmp_path / "cc", f'{before}\nexec {real} "$@" -O0 -w')

    return make


@pytest.fixture
def fresh(tmp_path, monkeypatch, compiler):
    """As in a new process with an empty cache and a quick compiler: gives the list of what is said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(compiler()))
    monkeypatch.delenv("CHATGLM_CPU_KERNEL", raising=False)
    handler = Messages()
    for module in (kernels_cpu, kernel_cache):
        module.logger.addHandler(handler)
    forget()
    yield handler.said
    for module in (kernels_cpu, kernel_cache):
        module.logger.removeHandler(handler)
    monkeypatch.undo()
    forget()


@pytest.fixture
def alone(monkeypatch):
    """No compiler but CC's."""
    monkeypatch.setattr(kernel_cache, "COMPILERS", ())


def forget():
    """What a process remembers of its library; a new process starts so."""
    kernels_cpu._load.cache_clear()
    kernel_cache._usable_folder.cache_clear()
    logging.Logger.warning_once.cache_clear()


def works(library: Library) -> bool:
    y = library.linear(torch.ones(2, 6), torch.full((3, 6), 2, dtype=torch.int8), torch.ones(3), None, 8)
    return torch.allclose(y, torch.full((2, 3), 12.0), rtol=4 * ROUNDING[torch.float32], atol=0)


def cached(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache" / "chatglm_int8").iterdir())


def test_compiled_once_into_a_private_folder(fresh, tmp_path, compiler):
    library = kernels_cpu.library()
    assert works(library)
    assert kernels_cpu.library() is library
    (path,) = cached(tmp_path)
    assert path.suffix == ".so"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not fresh
    forget()
    compiler('case "$*" in *-shared*-o*) exit 1;; esac')  # may tell its version and macros, and compile nothing
    assert works(kernels_cpu.library())
    assert cached(tmp_path) == [path]
    assert not fresh


def test_other_source_flags_or_compiler_make_another_file(fresh, tmp_path, monkeypatch):
    paths = {kernels_cpu.build(), kernels_cpu.build(FLAGS)}
    monkeypatch.setitem(kernels_cpu.SOURCES, "kernels/cpu/gelu.h", kernels_cpu.SOURCES["kernels/cpu/gelu.h"] + "\n")
    paths.add(kernels_cpu.build())
    monkeypatch.setenv("CC", f"{os.environ['CC']} -DANOTHER=1")
    paths.add(kernels_cpu.build())
    assert len(paths) == 4
    assert cached(tmp_path) == sorted(paths)


def test_cc_may_have_arguments(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", f"{os.environ['CC']} -DNOTHING=1 '-DSPACED=a b'")
    assert kernel_cache.compilers()[0][1:] == ["-DNOTHING=1", "-DSPACED=a b"]
    assert works(kernels_cpu.library())
    assert len(cached(tmp_path)) == 1


def test_cc_may_be_relative(fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CC", "./cc -I. -include marker.h")
    (tmp_path / "marker.h").touch()
    assert works(kernels_cpu.library())
    assert not fresh


@pytest.mark.parametrize("given", ["", "   "])
def test_an_empty_cc_names_no_compiler(fresh, monkeypatch, given):
    monkeypatch.setenv("CC", given)
    assert kernel_cache.compilers()[0] in (["cc"], ["gcc"], ["clang"])


@pytest.mark.parametrize("case", ["no compiler", "CC is missing", "turned off"])
@pytest.mark.parametrize("golden", ["int8", "int4"])
def test_goldens_without_a_library(fresh, alone, tmp_path, monkeypatch, cases, golden_model, case, golden):
    (tmp_path / "empty").mkdir()
    if case == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
        monkeypatch.delenv("CC")
    elif case == "CC is missing":
        monkeypatch.setenv("CC", "/nowhere/cc -O2")
    else:
        monkeypatch.setenv("CHATGLM_CPU_KERNEL", "0")
    model, prompt = golden_model(golden), cases[f"{golden}_single.input_ids"]
    greedy = model.generate(prompt, do_sample=False, max_new_tokens=24)
    assert torch.equal(greedy, cases[f"{golden}_single.greedy"])
    with torch.no_grad():
        logits = model(prompt).logits
    expected = cases[f"{golden}_single.logits"]
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert kernels_cpu.library() is None
    assert not (tmp_path / "cache").exists()
    if case == "turned off":
        assert not fresh
    else:
        (message,) = fresh
        assert "install gcc" in message
        assert "/nowhere/cc" in message or case == "no compiler"


def test_goldens_with_a_library(fresh, cases, golden_model):
    for golden in ("base", "int8", "int4", "prefix"):
        model, prompt = golden_model(golden), cases[f"{golden}_single.input_ids"]
        assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=24), cases[f"{golden}_single.greedy"])
        with torch.no_grad():
            logits = model(prompt).logits
        expected = cases[f"{golden}_single.logits"]
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert kernels_cpu._load.cache_info().currsize == 1
    assert kernels_cpu.library() is not None


def test_a_compiler_that_fails_is_quoted(fresh, alone, tmp_path, monkeypatch):
    script = write_script(tmp_path / "broken", "echo 'broken: out of cheese' >&2; exit 1")
    monkeypatch.setenv("CC", f"{script} --for-real")
    assert kernels_cpu.library() is None
    assert kernels_cpu.library() is None
    (message,) = fresh
    assert f"{script} --for-real" in message
    assert "out of cheese" in message
    assert "plain PyTorch" in message
    layer = QuantizedLinear.from_linear(nn.Linear(8, 4), 8)
    with torch.no_grad():
        assert layer(torch.ones(3, 8)).isfinite().all()
    assert len(fresh) == 1


def test_a_compiler_that_fails_at_the_source_leaves_nothing(fresh, alone, tmp_path, compiler):
    compiler('case "$*" in *-shared*-o*) echo "no such instruction" >&2; exit 1;; esac')
    assert kernels_cpu.library() is None
    (message,) = fresh
    assert "-march=native" in message
    assert "no such instruction" in message
    assert cached(tmp_path) == []


def test_a_compiler_error_names_the_file_of_the_repository(fresh, alone, monkeypatch):
    text = kernels_cpu.SOURCES["kernels/cpu/linear.h"]
    monkeypatch.setitem(kernels_cpu.SOURCES, "kernels/cpu/linear.h", "int 5;\n" + text)
    assert kernels_cpu.library() is None
    (message,) = fresh
    assert "\nkernels/cpu/linear.h:1:" in message
    assert " kernels/cpu/kernels.c -o" in message
    assert f"{tempfile.gettempdir()}/chatglm_int8-" not in message


def test_a_compiler_that_hangs_is_given_up(fresh, alone, tmp_path, compiler, monkeypatch):
    monkeypatch.setattr(kernel_cache, "_TIMEOUT", 0.2)
    calls = tmp_path / "calls"
    compiler(f"echo >> {calls}; exec sleep 20")
    assert kernels_cpu.library() is None
    (message,) = fresh
    assert "timed out" in message
    assert calls.read_text() == "\n"


def test_a_locale_that_is_not_utf8(fresh, tmp_path, compiler):
    """The sources have letters that it lacks, and a compiler may say what is no UTF-8."""
    code = r"""if True:
        from chatglm_int8 import kernels_cpu

        assert not all(map(str.isascii, kernels_cpu.SOURCES.values()))
        try:
            kernels_cpu.build()
        except kernels_cpu.CompileError as error:
            print(ascii(str(error).splitlines()[-1]))
    """
    # Keeps the files that it is given, which lie in a temporary folder.
    compiler(f"""for file; do case $file in *kernels.c)
        cp -r "$(dirname "$file")" {tmp_path}/given; printf '\\374' >&2; exit 1;; esac; done""")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == r"'\ufffd'"
    given = {f"kernels/cpu/{path.relative_to(tmp_path / 'given').as_posix()}": path.read_bytes()
             for path in (tmp_path / "given").rglob("*") if path.is_file()}  # fmt: skip
    assert given == {name: text.encode() for name, text in kernels_cpu.SOURCES.items()}


def test_a_cc_that_is_no_command(fresh, alone, monkeypatch):
    monkeypatch.setenv("CC", "gcc '-DX=")
    assert kernels_cpu.library() is None
    (message,) = fresh
    assert "No closing quotation" in message


def test_a_compiler_without_openmp_gives_one_thread(fresh, compiler):
    compiler("""case "$*" in *-fopenmp*) echo "unsupported option '-fopenmp'" >&2; exit 1;; esac""")
    library = kernels_cpu.library()
    assert works(library)
    assert kernels_cpu.library() is library
    (message,) = fresh
    assert "one thread" in message
    assert "unsupported option '-fopenmp'" in message
    weight = make_weight(70, 64, 8)
    for m in (1, 2, 40):
        check(library, normal(m, 64).half(), weight, torch.ones(70), threads=4)


@pytest.mark.parametrize("case", ["a file", "no home", "read-only"])
def test_a_cache_that_cannot_be_written(fresh, tmp_path, monkeypatch, case):
    if case == "a file":
        (tmp_path / "cache").write_text("")
    elif case == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")

        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    else:
        if os.getuid() == 0:
            pytest.skip("root may write anywhere")
        (tmp_path / "cache").mkdir(mode=0o500)
    assert works(kernels_cpu.library())
    folder = kernel_cache.cache_folder()
    assert tmp_path not in folder.parents
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (message,) = fresh
    assert "can't be kept on disk" in message


@pytest.mark.parametrize("case", ["writable by all", "writable by the group", "somebody else's"])
def test_a_cache_where_others_could_plant_a_library(fresh, tmp_path, monkeypatch, case):
    folder = tmp_path / "cache" / "chatglm_int8"
    folder.mkdir(parents=True, mode=0o700)
    if case == "somebody else's":
        uid = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    else:
        folder.chmod(0o777 if case == "writable by all" else 0o770)
    assert works(kernels_cpu.library())
    assert cached(tmp_path) == []
    assert folder not in kernel_cache.cache_folder().parents
    (message,) = fresh
    assert "can be written by others" in message


BROKEN = r"""
import os, sys
from pathlib import Path

from chatglm_int8 import kernel_cache, kernels_cpu

(path,) = Path(sys.argv[1]).iterdir()
whole = path.read_bytes()
for content in (b"", b"no library", whole[:4], whole[:4096], whole[: len(whole) // 2], whole[:-1]):
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    child = os.fork()  # which might die of it
    if not child:
        os._exit(0 if kernels_cpu.library() else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), path.stat().st_size == len(whole))
"""


def test_a_broken_library_on_disk(fresh, tmp_path):
    """A file that is no library is compiled again."""
    assert kernels_cpu.library()
    (path,) = cached(tmp_path)
    done = subprocess.run([sys.executable, "-c", BROKEN, path.parent], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 True\n" * 6
    assert cached(tmp_path) == [path]


def test_another_processor_makes_another_file(fresh, monkeypatch):
    """Of homes that machines share: -march=native says in macros what it means."""
    macros, first = kernels_cpu._machine_macros, kernels_cpu.build()
    monkeypatch.setattr(kernels_cpu, "_machine_macros", lambda command: macros(command) + "#define ANOTHER 1\n")
    assert kernels_cpu.build() != first


def test_amx_that_the_system_refuses(fresh, monkeypatch):
    tried = []

    def open_one(flags, compiler):
        tried.append(flags)
        return types.SimpleNamespace(allowed=len(tried) > 1)

    monkeypatch.setattr(kernels_cpu, "_open", open_one)
    assert kernels_cpu.library().allowed
    usual = (*FLAGS, OPENMP)
    assert tried == [usual, (*usual, *WITHOUT_AMX)]


def test_unfinished_files_of_others_stay(fresh, tmp_path):
    folder = kernel_cache.cache_folder()
    for name, age in (("young.tmp", 0), ("old.tmp", 7200)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    kernel_cache.keep("new", lambda path: path.write_text("x"))
    assert [path.name for path in cached(tmp_path)] == ["new", "young.tmp"]


def test_a_cache_that_is_removed(fresh, tmp_path):
    library = kernels_cpu.library()
    shutil.rmtree(tmp_path / "cache")
    assert works(library)
    kernels_cpu._load.cache_clear()
    assert works(kernels_cpu.library())
    assert len(cached(tmp_path)) == 1
    assert not fresh


EIGHT = r"""
import multiprocessing, os, signal, sys, time
from pathlib import Path

from chatglm_int8 import kernel_cache, kernels_cpu
import torch

folder = Path(sys.argv[1])
assert not (folder / "cache").exists(), "importing compiled"


def work(number, answers, start):
    os.environ["CC"] += f" -DNUMBER=1"
    start.wait()
    if number == 0:
        os.environ["VICTIM"] = str(folder / "compiling")
    library = kernels_cpu.library()
    y = library.linear(torch.ones(2, 64), torch.full((3, 64), 2, dtype=torch.int8), torch.ones(3), None, 8)
    answers.put((number, y.tolist()))


fork = multiprocessing.get_context("fork")  # imports once
answers, start = fork.Queue(), fork.Event()
processes = [fork.Process(target=work, args=(i, answers, start)) for i in range(8)]
for process in processes:
    process.start()
start.set()
deadline = time.time() + 100
while not (folder / "compiling").exists():
    assert time.time() < deadline
    time.sleep(0.01)
os.kill(processes[0].pid, signal.SIGKILL)
print(sorted(answers.get(timeout=100)[0] for _ in range(7)))
for process in processes:
    process.join(100)
print([process.exitcode for process in processes])
"""


def test_eight_processes_start_together_and_one_is_killed(fresh, tmp_path, compiler):
    compiler('case "$*" in *-shared*-o*) if [ -n "$VICTIM" ]; then touch "$VICTIM"; sleep 0.5; fi;; esac')
    done = subprocess.run([sys.executable, "-c", EIGHT, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"[1, 2, 3, 4, 5, 6, 7]\n[{-9}, 0, 0, 0, 0, 0, 0, 0]\n"
    files = cached(tmp_path)
    assert [path.suffix for path in files].count(".so") == 1
    assert {path.suffix for path in files} <= {".so", ".tmp"}
    left = [path for path in files if path.suffix == ".tmp"]
    assert len(left) <= 1
    for path in left:  # what the dead left goes later
        os.utime(path, (time.time() - 7200,) * 2)
    assert works(kernels_cpu.library())
    assert all(path.suffix == ".so" for path in cached(tmp_path))


# Operators


def sample_inputs(bits: int, dtype: torch.dtype = torch.float32):
    return normal(3, 64).to(dtype), make_weight(20, 64, bits), torch.rand(20).to(dtype), normal(20).to(dtype), bits


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16])
def test_opcheck(bits, dtype):
    x, weight, scale, bias, _ = sample_inputs(bits, dtype)
    for given, added in ((x, bias), (x.clone().requires_grad_(), None)):
        torch.library.opcheck(torch.ops.chatglm_int8.quantized_linear.default, (given, weight, scale, added, bits))
    grad = normal(3, 20).to(dtype)
    torch.library.opcheck(torch.ops.chatglm_int8.quantized_linear_input_gradient.default, (grad, weight, scale, bits))


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_compile_as_one_graph(bits):
    layer = QuantizedLinear.from_linear(nn.Linear(64, 20), bits)
    head = HalfLinear(20, 33, dtype=torch.float16)

    def both(x):
        return head(layer(x))

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for m in (1, 5):
        x = normal(m, 64).float()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), both(x), rtol=2e-3, atol=2e-3)
    ours, theirs = normal(4, 64).float().requires_grad_(), normal(4, 64).float().requires_grad_()
    layer(ours).square().sum().backward()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch._dynamo.reset()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_input(bits, dtype):
    x, weight, scale, bias, _ = sample_inputs(bits, dtype)
    x.requires_grad_()
    grad = normal(3, 20, seed=4).to(dtype)
    torch.ops.chatglm_int8.quantized_linear(x, weight, scale, bias, bits).backward(grad)
    w = (unpack_int4(weight) if bits == 4 else weight).double() * scale.double()[:, None]
    expected, size = grad.double() @ w, grad.double().abs() @ w.abs()
    assert ((x.grad.double() - expected).abs() <= size * (30 * ROUNDING[torch.float32] + 2 * ROUNDING[dtype])).all()


def test_the_modules_may_be_imported_twice(monkeypatch):
    """As trust_remote_code does beside an installed package: the operators are registered again."""
    twin = types.ModuleType(
        "chatglm_twin"
    )  # without __init__.py, which would put the twin's classes in the Auto classes
    twin.__path__ = [str(Path(quantization.__file__).parent)]
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "chatglm_twin", twin)
    try:
        again = importlib.import_module("chatglm_twin.quantization")
        assert again is not quantization
        for module in (again, quantization):
            x = normal(3, 64).float().requires_grad_()
            module.QuantizedLinear.from_linear(nn.Linear(64, 20), 8)(x).sum().backward()
            assert x.grad.isfinite().all()
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("chatglm_twin."):
                del sys.modules[name]


# Embedding and LM head that stay half


def half_layers(model) -> list[nn.Module]:
    found = [module for module in model.modules() if isinstance(module, HalfEmbedding | HalfLinear)]
    assert len(found) == 2
    return found


def logits_of(model, ids=((7, 8, 9, 501, 504),)) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits


@pytest.mark.parametrize("bits", [8, 4])
def test_float_of_a_quantised_model_copies_no_embedding(golden_model, bits):
    model = golden_model(f"int{bits}", torch.float16)
    before = [layer.weight.data_ptr() for layer in half_layers(model)]
    logits = logits_of(model)
    assert model.float() is model
    assert model.dtype == torch.float32
    for layer, pointer in zip(half_layers(model), before, strict=True):
        assert layer.weight.dtype == torch.float16
        assert layer.weight.data_ptr() == pointer
    assert len(set(before)) == 1 or not model.config.tie_word_embeddings
    assert logits_of(model).dtype == torch.float32
    assert (logits_of(model) - logits).abs().max() < 2e-2 * logits.abs().max()


def test_half_layers_give_what_float_layers_give(golden_model):
    """The weights are float16 numbers, so a float32 copy of them gives the same logits up to the order of sums."""
    model = golden_model("int8", torch.float16).float()
    twin = copy.deepcopy(model)
    for layer in half_layers(twin):
        layer.stays_half = False
    twin.float()
    assert all(layer.weight.dtype == torch.float32 for layer in half_layers(twin))
    torch.testing.assert_close(logits_of(model), logits_of(twin), rtol=1e-4, atol=1e-5)
    long = ((*range(5, 105), 501, 504),)  # more rows than the kernel takes
    torch.testing.assert_close(logits_of(model, long), logits_of(twin, long), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_casts_copies_and_files_keep_the_numbers(golden_model, tmp_path, cast):
    model = getattr(golden_model("int8", torch.float16), cast)()
    expected = logits_of(model)
    assert expected.dtype == model.dtype == {"half": torch.float16, "bfloat16": torch.bfloat16}.get(cast, torch.float32)
    is_tied = model.lm_head.weight is model.transformer.word_embeddings.weight
    twin = copy.deepcopy(model)
    assert (twin.lm_head.weight is twin.transformer.word_embeddings.weight) == is_tied
    assert twin.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    assert torch.equal(logits_of(twin), expected)
    model.save_pretrained(tmp_path)
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, dtype=model.dtype)
    again.set_attn_implementation("eager")
    assert (again.lm_head.weight is again.transformer.word_embeddings.weight) == is_tied
    assert torch.equal(logits_of(again), expected)
    if cast == "float":
        assert all(layer.weight.dtype == torch.float16 for layer in half_layers(again))


def test_a_float_model_is_converted_as_usual(golden_model):
    model = golden_model("base", torch.float16).float()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.half().parameters()} == {torch.float16}
    assert {parameter.dtype for parameter in model.double().parameters()} == {torch.float64}


def test_numbers_that_half_cannot_hold_stay_float(golden_model):
    model = golden_model("int8").float()
    head = model.lm_head
    head.weight.data = head.weight.data.float()
    head.weight.data[0, 0] = 1 + 2**-20
    model._keep_embeddings_half()
    assert head.weight.dtype == torch.float32
    assert head.weight[0, 0] == 1 + 2**-20


# The cache that grows in place


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("golden", ["base", "int8", "prefix"])
def test_generate_with_a_growing_cache(golden_model, monkeypatch, settings, golden):
    """It is the model's own choice; a caller's cache stays as it is."""
    monkeypatch.setattr(cuda_graphs, "_GROWTH", 5)  # so that it must grow now and then
    model, ids = golden_model(golden), torch.tensor([[7, 8, 9, 501, 504], [9, 8, 7, 501, 504]])
    settings = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True, **settings}
    found = []
    for cache, kind in ((None, GrowingLayer), (DynamicCache(config=model.config), DynamicLayer)):
        torch.manual_seed(3)
        output = model.generate(ids, past_key_values=cache, **settings)
        assert {type(layer) for layer in output.past_key_values.layers} == {kind}
        found.append(output.sequences)
    assert torch.equal(*found)


def both_caches():
    caches = DynamicCache(), DynamicCache()
    caches[0].layers.append(GrowingLayer())
    return caches


def append(caches, count: int, seed: int, batch: int = 2) -> None:
    key, value = normal(batch, 3, count, 8, seed=seed).float(), normal(batch, 3, count, 8, seed=seed + 1).float()
    ours, theirs = (cache.update(key, value, 0) for cache in caches)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_a_growing_layer_does_what_a_dynamic_layer_does(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_GROWTH", 4)
    caches = both_caches()
    for step, count in enumerate((5, 1, 1, 7, 1, 1, 1, 30, 1)):
        append(caches, count, seed=step)
    for change in (
        lambda cache: cache.crop(-3),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.crop(-20),
    ):
        for cache in caches:
            change(cache)
        append(caches, 1, seed=50)
        append(caches, 9, seed=60)
    for cache in caches:
        cache.batch_repeat_interleave(2)
    append(caches, 1, seed=70, batch=4)
    for cache in caches:  # a view of the buffer's first sequences
        cache.layers[0].keys, cache.layers[0].values = cache.layers[0].keys[:1], cache.layers[0].values[:1]
    append(caches, 2, seed=80, batch=1)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([0]))
    append(caches, 2, seed=90, batch=1)


def test_copies_of_a_growing_cache_go_their_own_ways(golden_model):
    model = golden_model("base")
    prompt = torch.tensor([[7, 8, 9, 501, 504]])
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        for ids in ([[11, 12, 13]], [[21, 22, 23]]):
            ids = torch.tensor(ids)
            mine = copy.deepcopy(twin)
            logits = model(torch.cat((prompt, ids), dim=1), use_cache=False).logits[:, -3:]
            steps = [model(ids[:, i : i + 1], past_key_values=mine, position_ids=model.get_position_ids(
                torch.cat((prompt, ids), dim=1))[..., 5 + i : 6 + i]).logits for i in range(3)]  # fmt: skip
            torch.testing.assert_close(torch.cat(steps, dim=1), logits, rtol=1e-4, atol=1e-5)
        assert cache.get_seq_length() == twin.get_seq_length() == 5
    assert torch.equal(cache.layers[0].keys, twin.layers[0].keys)


def test_growing_layer_after_a_step_with_gradients():
    caches = both_caches()
    key, value = normal(2, 3, 4, 8).float().requires_grad_(), normal(2, 3, 4, 8).float()
    for cache in caches:
        cache.update(key, value, 0)
    with torch.no_grad():
        append(caches, 1, seed=1)
        append(caches, 1, seed=2)
