"""The compiled CPU kernels: their numbers at every instruction level of this machine, and how they come to be compiled.

Letters: M rows of an activation, K in_features, N out_features; B batch, H heads, T keys, D head dimension.
"""

import contextlib
import platform
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from chatglm_int8 import kernels_cpu
from chatglm_int8.kernels_cpu import FLAGS, OPENMP, WITHOUT_AMX, Library
from chatglm_int8.kernels_cpu_source import SOURCE
from chatglm_int8.modeling_chatglm import apply_rotary, rotary_embedding
from chatglm_int8.quantization import pack_int4, unpack_int4

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
IS_X86 = platform.machine() in ("x86_64", "AMD64")
IS_ARM = platform.machine() in ("aarch64", "arm64")
GCC = shutil.which("gcc")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")
needs_gcc = pytest.mark.skipif(GCC is None, reason="needs gcc")


def levels() -> dict[str, tuple[str, ...]]:
    """Names of instruction levels that this machine can run, and the flags that force them."""
    found = {"native": ()}
    if "amx_int8" in CPU:
        found["no AMX"] = WITHOUT_AMX
    if "avx512_vnni" in CPU:
        found["no VNNI"] = (*WITHOUT_AMX, "-mno-avx512vnni")
    if "avx_vnni" in CPU:
        found["AVX2 with VNNI"] = ("-march=x86-64-v3", "-mavxvnni")
    if all(f" {name} " in CPU for name in ("avx2", "fma", "f16c")) and ("avx512bw" in CPU or "avx_vnni" in CPU):
        found["AVX2"] = ("-march=x86-64-v3",)
    if IS_X86:
        found["portable C"] = ("-march=x86-64",)
    if "EMULATE_AMX" in SOURCE and "amx_int8" not in CPU:
        found["AMX emulated"] = ("-DEMULATE_AMX",)
    if IS_ARM:
        found["NEON"] = ("-march=armv8-a",)
    return found


LEVELS = levels()
EXPECTED = {
    "AMX emulated": "AMX",
    "no AMX": "AVX512",
    "no VNNI": "AVX512",
    "AVX2 with VNNI": "AVX2",
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
                patch.setattr(kernels_cpu, "cache_folder", lambda: tmp_path_factory.getbasetemp())
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


def splits(library: Library, rows: int) -> bool:
    """Whether activations are split into integers: those of a single row on a matrix unit alone."""
    return rows > 1 or library.instructions == "AMX"


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
    if splits(library, x.shape[0]):
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
    y, exact = check(kernels, x[:1], weight, scale)
    if not splits(kernels, 1):
        assert frobenius(y, exact) < 2 * ROUNDING[dtype]


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
@pytest.mark.parametrize("t", [1, 2, 15, 16, 17, 300, 2000])
def test_attention(kernels, dtype, t):
    for d in (16, 48, 80, 128, 256) if t < 2000 else (128,):
        query, key, value = (normal(2, 3, n, d, seed=i).to(dtype) for i, n in enumerate((1, t, t)))
        check_attention(kernels, query * 3, key, value, None, threads=1 + d % 5)
    mask = torch.zeros(2, 1, 1, t, dtype=dtype)
    mask[0, ..., : t // 2] = torch.finfo(dtype).min
    mask[1, ..., t // 3 : t // 2] = -torch.inf
    check_attention(kernels, query, key, value, mask)
    check_attention(kernels, query, key, value, mask[1:])  # for all sequences
    check_attention(kernels, query, key, value, mask.expand(2, 3, 1, t)[:, :1])


def test_attention_with_strides(kernels):
    """As the model calls it: queries cut from a product, keys and values views of buffers with room for more."""
    for dtype in DTYPES:
        qkv = normal(2, 1, 4, 96).to(dtype)
        query = qkv[..., :32].transpose(1, 2)
        key, value = normal(2, 4, 300, 32, seed=1).to(dtype)[:, :, :77], normal(2, 77, 4, 32, seed=2).to(dtype)
        mask = normal(2, 1, 1, 100, seed=3).to(dtype)[..., 20:97]
        check_attention(kernels, query, key, value.transpose(1, 2), mask, threads=3)
        check_attention(kernels, query[:1].expand(2, 4, 1, 32), key[:1].expand(2, 4, 77, 32), key, mask)


def test_attention_to_one_key_among_many(kernels):
    """Large scores: no exponential overflows, and one key takes all."""
    query, key, value = torch.full((1, 1, 1, 64), 40.0), normal(1, 1, 50, 64).float(), normal(1, 1, 50, 64).float() + 1
    key[0, 0, 7] = 40.0
    assert torch.equal(kernels.attention(query, key, value, None, 1.0)[0, 0], value[0, :, 7])
    assert torch.equal(kernels.attention(-query, -key, value, None, 1.0)[0, 0], value[0, :, 7])


def test_attention_when_all_is_masked(kernels):
    """Of keys all masked with the smallest number, each counts the same, as in softmax."""
    query, key, value = (normal(1, 2, n, 32, seed=n).float() for n in (1, 20, 20))
    mask = torch.full((1, 1, 1, 20), torch.finfo(torch.float32).min)
    context = kernels.attention(query * 1e-3, key, value, mask, 1.0)
    torch.testing.assert_close(context[:, 0], value.mean(dim=2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_attention_hides_nothing_that_is_not_finite(kernels, where, number):
    for dtype in DTYPES:
        tensors = {name: normal(2, 2, 1 if name == "query" else 40, 32, seed=i).to(dtype).abs()
                   for i, name in enumerate(("query", "key", "value"))}  # fmt: skip
        expected = kernels.attention(**tensors, mask=None, scaling=0.1)
        tensors[where][1, 1, -1, 5] = number
        context = kernels.attention(**tensors, mask=None, scaling=0.1)
        touched = context[1, 0, 1] if where != "value" else context[1, 0, 1, 5]
        assert not touched.isfinite().any()
        assert torch.equal(context[0], expected[0])
        assert torch.equal(context[1, 0, 0], expected[1, 0, 0])


def test_attention_refuses_other_tensors(libraries):
    library, good = libraries("native"), torch.ones(1, 2, 1, 32)
    for query, key, mask in (
        (torch.ones(1, 2, 2, 32), good, None),
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
