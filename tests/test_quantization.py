"""INT8 and INT4 weights: how they are made, stored, multiplied, and trained around.

Letters: M rows of an activation, K in_features, N out_features.
"""

import copy
import gc
import pickle
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from chatglm_int8 import quantization
from chatglm_int8.quantization import (
    HalfEmbedding,
    HalfLinear,
    QuantizedLinear,
    check_bits,
    dequantize_weight,
    pack_int4,
    quantize_linears,
    quantize_weight,
    unpack_int4,
)

DATA = Path(__file__).resolve().parent / "data"
# Half a unit in the last place of 1: the relative error of one rounding.
ROUNDING = {
    torch.float64: 2**-53,
    torch.float32: 2**-24,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8,
}
DTYPES = list(ROUNDING)
SHAPES = [(1, 2), (3, 8), (5, 30), (17, 34), (64, 96), (33, 130)]  # N, K


def largest(bits):
    return 2 ** (bits - 1) - 1


def random_weight(n, k, dtype=torch.float32, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_layer(n=48, k=64, bits=8, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return QuantizedLinear.from_linear(nn.Linear(k, n, bias=bias).to(dtype), bits)


def float64_weight(layer):
    return layer.dequantize(torch.float64)


def reference(layer, x):
    """y and the sum of the magnitudes that went into it, both in float64."""
    weight, x = float64_weight(layer), x.double()
    bias = layer.bias.double() if layer.bias is not None else torch.zeros(layer.out_features, dtype=torch.float64)
    return x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs()


def bound(dtype, size, k):
    """Rounding bound of a sum of k products: accumulation in at least float32, then two roundings to the dtype (the
    product, and the sum with the bias)."""
    return size * ((k + 4) * ROUNDING[torch.float64 if dtype == torch.float64 else torch.float32] + 2 * ROUNDING[dtype])


# Making weights


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_weight_is_quantised_as_in_float64(bits, dtype, n, k):
    weight = random_weight(n, k, dtype)
    stored, scale = quantize_weight(weight, bits)
    assert stored.dtype == torch.int8
    assert list(stored.shape) == [n, k * bits // 8]
    assert scale.dtype == torch.float32
    integers = (unpack_int4(stored) if bits == 4 else stored).double()

    exact = weight.double().abs().amax(dim=1) / largest(bits)
    assert ((scale.double() - exact).abs() <= exact * (ROUNDING[dtype] + ROUNDING[torch.float32]) * 1.001).all()
    quotient = weight.double() / scale.double()[:, None]
    expected = quotient.round().clamp(-largest(bits) - 1, largest(bits))
    # A quotient within float32 rounding of a half may go either way.
    at_half = ((quotient - quotient.floor() - 0.5).abs() <= 2 * ROUNDING[torch.float32] * quotient.abs()) & (
        (integers - expected).abs() <= 1
    )
    assert ((integers == expected) | at_half).all()
    # Rounding down the scale may clip the largest number of a row, by no more than the scale was rounded.
    clipped = largest(bits) * ROUNDING[dtype] * 2
    error = (dequantize_weight(stored, scale, bits, torch.float64) - weight.double()).abs()
    assert (error <= scale.double()[:, None] * (0.5 + clipped + 1e-6)).all()


def test_halves_go_to_the_even_number():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]])
    stored, scale = quantize_weight(weight, 8)
    assert scale.tolist() == [1.0]
    assert stored.tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]
    stored, scale = quantize_weight(weight[:, :4] / 127 * 7, 4)
    assert unpack_int4(stored)[0, 0] == 7


@pytest.mark.parametrize("bits", [8, 4])
def test_fp16_scales_are_rounded_like_the_release(bits):
    """Maximum and first division in the weight's own dtype, which for fp16 rounds the scale."""
    weight = random_weight(200, 64, torch.float16)
    _, scale = quantize_weight(weight, bits)
    assert torch.equal(scale, scale.half().float())
    assert torch.equal(scale, (weight.float().abs().amax(dim=1) / largest(bits)).half().float())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["fp16", "fp32"])
def test_quantize_gives_the_golden_weights(golden_model, bits, name):
    """Bit for bit from fp16 weights. From the same numbers in fp32 the scales are not rounded before the division, so
    the integers at the edges differ by one; scales, rounded to fp16 afterwards, are the same."""
    golden = load_file(DATA / f"int{bits}.safetensors")
    golden = {key: value for key, value in golden.items() if not key.endswith("inv_freq")}
    model = golden_model("base", torch.float16 if name == "fp16" else torch.float32)
    assert model.quantize(bits) is model
    assert model.config.quantization_bit == bits
    state = model.state_dict()
    assert set(state) == set(golden)
    for key, expected in golden.items():
        if expected.is_floating_point():
            assert torch.equal(state[key].half(), expected), key
        else:
            assert state[key].dtype == torch.int8
            assert state[key].shape == expected.shape
            if name == "fp16":
                assert torch.equal(state[key], expected), key
            else:
                ours, theirs = (unpack_int4(w) if bits == 4 else w for w in (state[key], expected))
                difference = (ours.int() - theirs.int()).abs()
                assert difference.max() <= 1
                assert difference.double().mean() < 0.02


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_stay_zero(bits, dtype):
    weight = random_weight(4, 6, dtype)
    weight[1] = 0
    weight[3] = torch.finfo(dtype).smallest_normal / 2**9 if dtype != torch.float64 else 1e-300  # its scale underflows
    stored, scale = quantize_weight(weight, bits)
    assert scale[1] == 0
    assert (stored[1] == 0).all()
    restored = dequantize_weight(stored, scale, bits, torch.float32)
    assert restored.isfinite().all()
    assert (restored[[1, 3]].abs() < 1e-6).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_refuses_weights_that_are_not_finite(bits, number, dtype):
    weight = random_weight(5, 8, dtype)
    weight[3, 7] = number
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_weight(weight, bits)


def test_a_weight_that_is_not_finite_is_named(golden_model):
    model = golden_model("base")
    model.transformer.layers[1].mlp.dense_4h_to_h.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"1\.mlp\.dense_4h_to_h: .*NaN"):
        model.quantize(8)
    assert model.config.quantization_bit == 0


@pytest.mark.parametrize(
    ("weight", "bits", "message"),
    [
        (torch.ones(2, 3), 4, "K must be even; got K = 3"),
        (torch.ones(2, 3, dtype=torch.int8), 8, r"float matrix .* got torch.int8 \[2, 3\]"),
        (torch.ones(3), 8, r"float matrix .* got torch.float32 \[3\]"),
        (torch.ones(2, 2, 2), 8, "float matrix"),
        (torch.ones(2, 2), 3, "8 or 4 bits, got 3"),
        (torch.ones(2, 2), "8", "8 or 4 bits, got '8'"),
    ],
)
def test_refuses_what_is_no_weight(weight, bits, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(weight, bits)


def test_check_bits():
    check_bits(8)
    check_bits(4)
    for bits in (0, 1, 2, 16, None):
        with pytest.raises(ValueError, match="8 or 4 bits"):
            check_bits(bits)
    with pytest.raises(ValueError, match="8 or 4 bits"):
        QuantizedLinear(8, 8, bits=2)
    with pytest.raises(ValueError, match="8 or 4 bits"):
        dequantize_weight(torch.ones(1, 2, dtype=torch.int8), torch.ones(1), 16, torch.float32)
    with pytest.raises(ValueError, match="in_features must be even; got 7"):
        QuantizedLinear(7, 8, bits=4)


def test_int4_packing():
    """The even column in the high nibble, both in two's complement."""
    packed = pack_int4(torch.tensor([[7, -8, -1, 0, 3, -3]], dtype=torch.int8))
    assert packed.dtype == torch.int8
    assert [byte & 0xFF for byte in packed[0].tolist()] == [0x78, 0xF0, 0x3D]
    every_pair = torch.cartesian_prod(*[torch.arange(-8, 8, dtype=torch.int8)] * 2)
    assert torch.equal(unpack_int4(pack_int4(every_pair)), every_pair)
    assert len(pack_int4(every_pair).unique()) == 256
    every_byte = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(8, 32)
    assert torch.equal(pack_int4(unpack_int4(every_byte)), every_byte)


@pytest.mark.parametrize("bits", [8, 4])
def test_input_need_not_be_contiguous(bits):
    weight = random_weight(40, 24)
    expected = quantize_weight(weight.T.contiguous(), bits)
    for actual, reference_ in zip(quantize_weight(weight.T, bits), expected, strict=True):
        assert torch.equal(actual, reference_)


@pytest.mark.parametrize("bits", [8, 4])
def test_slices_change_nothing(monkeypatch, bits):
    """With weights made and multiplied in slices of a row or a few, as those of large layers are."""
    weight = random_weight(37, 24, torch.float16)
    expected = quantize_weight(weight, bits)
    layer, x = make_layer(37, 24, bits), random_weight(5, 24, seed=1).requires_grad_()
    y = layer(x)
    y.sum().backward()
    grad = x.grad.clone()
    for numel in (1, 24, 24 * 5, 24 * 36):
        monkeypatch.setattr(quantization, "_SLICE_NUMEL", numel)
        assert all(torch.equal(a, b) for a, b in zip(quantize_weight(weight, bits), expected, strict=True))
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-6)
        x.grad = None
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, grad, rtol=1e-5, atol=1e-6)


# The layer


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_forward_agrees_with_float64(bits, dtype, n, k):
    layer = make_layer(n, k, bits).to(dtype)
    for m in (1, 2, 7, 65):
        x = random_weight(m, k, dtype, seed=m)
        y = layer(x)
        assert y.dtype == dtype
        expected, size = reference(layer, x)
        assert ((y.double() - expected).abs() <= bound(dtype, size, k)).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_activation_decides_the_dtype(bits, scale_dtype, dtype):
    layer = make_layer(bits=bits).to(scale_dtype)
    x = random_weight(3, 64, dtype)
    y = layer(x)
    assert y.dtype == dtype
    expected, size = reference(layer, x)
    # The bias may be rounded to the activation's dtype first.
    assert ((y.double() - expected).abs() <= bound(dtype, size, 64) + ROUNDING[dtype] * size).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (1, 1, 64), (2, 3, 64), (2, 2, 2, 64)])
def test_any_number_of_dimensions(bits, bias, shape):
    layer = make_layer(bits=bits, bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 48)
    expected, size = reference(layer, x)
    assert ((y.double() - expected).abs() <= bound(torch.float32, size, 64)).all()
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("bits", [8, 4])
def test_activations_need_not_be_contiguous(bits):
    layer = make_layer(bits=bits)
    wide = random_weight(6, 128)
    for x in (wide[:, ::2], wide[::2, :64], random_weight(64, 6).T, wide[:1, :64].expand(4, 64)):
        assert not x.is_contiguous()
        torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=1e-6, atol=1e-6)


def test_an_activation_of_another_width_is_refused():
    layer = make_layer(48, 64)
    for shape in ((4, 32), (2, 128), (63,)):
        with pytest.raises((ValueError, RuntimeError)):
            layer(torch.ones(shape))


def test_weights_at_the_edges_of_int8():
    """The release may hold -128, which no weight is quantised to here."""
    layer = QuantizedLinear(4, 2)
    layer.weight.data = torch.tensor([[-128, 127, 0, 1], [127, 127, -128, -128]], dtype=torch.int8)
    layer.weight_scale.data = torch.tensor([0.5, 2.0])
    layer.bias.data = torch.tensor([1.0, -1.0])
    assert layer(torch.ones(1, 4)).tolist() == [[1.0, -5.0]]
    assert layer.dequantize().tolist() == [[-64.0, 63.5, 0.0, 0.5], [254.0, 254.0, -256.0, -256.0]]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_goes_to_the_input_alone(bits, dtype):
    layer = make_layer(bits=bits).to(dtype)
    x = random_weight(5, 64, dtype).requires_grad_()
    grad_y = random_weight(5, 48, dtype, seed=2)
    layer(x).backward(grad_y)
    weight = float64_weight(layer)
    expected, size = grad_y.double() @ weight, grad_y.double().abs() @ weight.abs()
    assert x.grad.dtype == dtype
    assert ((x.grad.double() - expected).abs() <= bound(dtype, size, 48)).all()
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("bits", [8, 4])
def test_gradient_is_the_derivative(bits):
    layer = make_layer(5, 6, bits, dtype=torch.float64)
    assert torch.autograd.gradcheck(layer, random_weight(3, 6, torch.float64).requires_grad_())


@pytest.mark.parametrize("is_frozen", [False, True], ids=["input trains", "input is frozen"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_trainable_bias_gets_its_gradient(dtype, is_frozen):
    layer = make_layer().to(dtype)
    x = random_weight(3, 64, dtype).view(1, 3, 64).requires_grad_(not is_frozen)
    grad_y = random_weight(3, 48, dtype, seed=2).view(1, 3, 48)
    expected = layer(x).detach()
    (grad_x,) = (None,) if is_frozen else torch.autograd.grad(layer(x), x, grad_y)
    layer.bias.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y.detach(), expected)
    y.backward(grad_y)
    torch.testing.assert_close(
        layer.bias.grad.double(), grad_y.double().sum((0, 1)), rtol=4 * ROUNDING[dtype], atol=0.05
    )
    assert is_frozen or torch.equal(x.grad, grad_x)


def test_a_trainable_bias_in_a_compiled_layer():
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    layer, x = make_layer(16, 32), random_weight(3, 32)
    layer.bias.requires_grad_()
    torch.compile(layer, fullgraph=True)(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((16,), 3.0))


def test_a_trainable_scale_still_gets_no_gradient():
    layer = make_layer()
    layer.weight_scale.requires_grad_()
    x = random_weight(2, 64).requires_grad_()
    layer(x).sum().backward()
    assert layer.weight_scale.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("bits", [8, 4])
def test_no_float_weight_outlives_a_call(bits):
    layer = make_layer(96, 64, bits)
    x = random_weight(2, 64).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda nothing: nothing):
        y = layer(x)
    assert not saved  # neither a copy of the input nor of the weight
    assert y.requires_grad
    y.sum().backward()
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.shape in ((96, 64), (64, 96))]
    assert not [t for t in alive if t.is_floating_point()]


def test_from_linear_keeps_device_dtype_and_bias():
    linear = nn.Linear(8, 4, dtype=torch.bfloat16)
    layer = QuantizedLinear.from_linear(linear, 8)
    assert isinstance(layer, nn.Linear)
    assert (layer.weight.dtype, layer.weight_scale.dtype, layer.bias.dtype) == (
        torch.int8,
        torch.bfloat16,
        torch.bfloat16,
    )
    assert torch.equal(layer.bias, linear.bias)
    assert QuantizedLinear.from_linear(nn.Linear(8, 4, bias=False), 4).bias is None
    assert QuantizedLinear.from_linear(linear, 8).training  # kernels beside autograd are for modules in eval mode
    assert not QuantizedLinear.from_linear(linear.eval(), 8).training
    assert "bits=8" in repr(layer)
    assert "in_features=8, out_features=4" in repr(layer)


def test_a_new_layer_has_no_float_weight():
    layer = QuantizedLinear(16, 4, bits=4, device="meta", dtype=torch.float16)
    shapes = {name: (list(p.shape), p.dtype, p.device.type) for name, p in layer.named_parameters()}
    assert shapes == {
        "weight": ([4, 8], torch.int8, "meta"),
        "weight_scale": ([4], torch.float16, "meta"),
        "bias": ([4], torch.float16, "meta"),
    }


CASTS = {
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to(dtype)": lambda m: m.to(torch.float16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.bfloat16),
    "cpu": lambda m: m.cpu(),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("first", CASTS)
@pytest.mark.parametrize("second", CASTS)
def test_casts_leave_the_integers_alone(bits, first, second):
    layer = make_layer(bits=bits)
    weight = layer.weight.clone()
    CASTS[second](CASTS[first](layer))
    assert torch.equal(layer.weight, weight)
    assert layer.weight_scale.dtype == layer.bias.dtype
    expected = {"half": torch.float16, "float": torch.float32, "bfloat16": torch.bfloat16, "double": torch.float64}
    if second in expected:
        assert layer.weight_scale.dtype == expected[second]
    y = layer(torch.ones(2, 64, dtype=layer.bias.dtype))
    assert y.dtype == layer.bias.dtype


def test_to_meta_and_empty():
    layer = make_layer().half().to("meta")
    assert layer.weight.device.type == "meta"
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float16)
    assert layer(torch.ones(3, 64, device="meta", dtype=torch.float16)).shape == (3, 48)


def test_a_weight_that_stays_half_is_shared_and_made_of_nothing():
    embedding = HalfEmbedding(5, 8, dtype=torch.float16)
    embedding.stays_half = True
    embedding.float()
    assert embedding.weight.dtype == torch.float16
    assert embedding.share_memory().weight.is_shared()
    empty = embedding.to("meta").to_empty(device="cpu")
    assert (empty.weight.device.type, empty.weight.dtype) == ("cpu", torch.float16)


@pytest.mark.parametrize("bits", [8, 4])
def test_copies_are_equal_and_apart(bits):
    layer, x = make_layer(bits=bits), random_weight(2, 64)
    fresh = QuantizedLinear(64, 48, bits=bits)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert isinstance(other, QuantizedLinear)
        assert other.bits == bits
        assert torch.equal(other(x), layer(x))
        assert not any(p.requires_grad for p in other.parameters())
        other.weight.data.zero_()
        assert (layer.weight != 0).any()


def test_a_state_dict_of_another_width_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_layer(bits=8).load_state_dict(make_layer(bits=4).state_dict())
    with pytest.raises(RuntimeError, match="weight_scale"):
        make_layer().load_state_dict(nn.Linear(64, 48).state_dict())


# The stored integers


FLOAT_USES = {
    "float": lambda w: w.float(),
    "to": lambda w: w.to(torch.float64),
    "to a float tensor": lambda w: w.to(torch.ones(1)),
    "mul": lambda w: w * 0.5,
    "rmul": lambda w: torch.ones(64) * w,
    "add": lambda w: w + torch.ones(48, 64),
    "add int8": lambda w: w + torch.ones_like(w),
    "iadd of data": lambda w: w.data.__iadd__(torch.ones(48, 64)),
    "add_ of a copy": lambda w: w.detach().clone().add_(1),
    "matmul": lambda w: w @ torch.ones(64, 2, dtype=torch.int8),
    "linear": lambda w: nn.functional.linear(torch.ones(2, 64), w),
    "transposed": lambda w: torch.ones(2, 64) @ w.T,
    "norm": lambda w: torch.linalg.norm(w, dim=1),
    "copy_": lambda w: w.copy_(torch.ones(48, 64)),
    "data": lambda w: setattr(w, "data", torch.ones(48, 64)),
    "rows": lambda w: w[:3].T.float(),
    "chunks": lambda w: w.chunk(2)[0] * 2.0,
    "cat": lambda w: torch.cat([w, torch.ones(1, 64)]),
}


@pytest.mark.parametrize("use", FLOAT_USES)
def test_integers_are_not_taken_for_floats(use):
    layer = make_layer()
    before = layer.state_dict()["weight"].clone()
    with pytest.raises(RuntimeError, match=r"integers without their scales.*dequantize"):
        FLOAT_USES[use](layer.weight)
    assert torch.equal(layer.state_dict()["weight"], before)


def test_a_float_weight_is_refused():
    layer = make_layer()
    with pytest.raises(RuntimeError, match="integers without their scales"):
        layer.weight = nn.Parameter(torch.ones(48, 64))


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_a_parameter_otherwise(bits, tmp_path):
    layer = make_layer(bits=bits)
    weight, stored = layer.weight, dict(layer.named_parameters())["weight"]
    assert type(stored) is nn.Parameter  # which state dictionaries, optimizers and DDP see
    assert isinstance(weight, nn.Parameter)
    assert (weight.dtype, weight.shape, weight.device) == (stored.dtype, stored.shape, stored.device)
    assert weight.data_ptr() == stored.data_ptr()
    assert not weight.requires_grad
    assert torch.equal(weight, stored)
    assert weight.tolist() == stored.tolist()
    assert "tensor" in repr(weight)
    assert torch.equal(weight.to(torch.int16) >> 4, stored.to(torch.int16) >> 4)
    assert torch.equal(dequantize_weight(weight, layer.weight_scale, bits, torch.float32), layer.dequantize())
    weight.mark = 1
    assert stored.mark == layer.weight.mark == 1
    weight[0].zero_()
    assert not stored[0].any()
    weight.data = torch.ones_like(stored)
    assert (stored == 1).all()
    assert stored is dict(layer.named_parameters())["weight"]
    torch.save({"weight": weight}, tmp_path / "saved")
    assert type(torch.load(tmp_path / "saved")["weight"]) is nn.Parameter
    layer.weight = nn.Parameter(weight.clone().zero_(), requires_grad=False)
    assert type(layer.state_dict()["weight"]) is torch.Tensor
    assert type(dict(layer.named_parameters())["weight"]) is nn.Parameter
    assert torch.equal(layer(torch.ones(2, 64)), layer.bias.expand(2, -1))


# Export


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exported_programs_have_operators_of_torch_alone(bits, dtype):
    layer, x = make_layer(bits=bits).to(dtype).eval(), random_weight(6, 64, dtype).view(2, 3, 64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},))
    assert all(str(node.target).startswith("aten") for node in program.graph.nodes if node.op == "call_function")
    x = x[:, :2].reshape(-1, 64)
    expected, size = reference(layer, x)
    difference = (program.module()(x.view(2, 2, 64)).view(4, 48).double() - expected).abs()
    assert (difference <= bound(dtype, size, 64) + ROUNDING[dtype] * size).all()  # scale · integer is rounded, too


def run_onnx(module: nn.Module, given: torch.Tensor, path: Path, dynamo: bool) -> torch.Tensor:
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    torch.onnx.export(module, (given,), path, dynamo=dynamo)
    session = runtime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: given.numpy()})[0])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_computes_the_same(bits, tmp_path):
    layer, x = make_layer(bits=bits).eval(), random_weight(6, 64).view(2, 3, 64)
    torch.testing.assert_close(run_onnx(layer, x, tmp_path / "layer.onnx", False), layer(x))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_scores_the_same(bits, dynamo, golden_model, tmp_path):
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = golden_model(f"int{bits}")

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    model, ids = Scores().eval(), torch.tensor([[7, 8, 9, 501, 504, 10, 11]])
    with torch.no_grad():
        expected = model(ids)
    got = run_onnx(model, ids, tmp_path / "model.onnx", dynamo)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


# Whole models


def test_quantising_twice(golden_model):
    model = golden_model("base", torch.float16).quantize(8)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.quantize(8) is model
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="quantised to 8 bits already and can't go to 4"):
        model.quantize(4)
    for bits in (0, 2, 16, None):
        with pytest.raises(ValueError, match="8 or 4 bits"):
            model.quantize(bits)
    assert model.config.quantization_bit == 8


@pytest.mark.parametrize("bits", [8, 4])
def test_only_the_linears_of_the_blocks_are_quantised(golden_model, bits):
    model = golden_model("prefix_proj").quantize(bits)
    names = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    layers = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert names == {f"transformer.layers.{i}.{layer}" for i in range(3) for layer in layers}
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(name.startswith("transformer.prefix_encoder.") for name in trainable)


def test_float_weights_are_freed_one_by_one(golden_model, monkeypatch):
    blocks = golden_model("base").transformer.layers
    floats = [weakref.ref(m.weight) for m in blocks.modules() if isinstance(m, nn.Linear)]
    assert len(floats) == 12
    alive = []
    make = QuantizedLinear.from_linear

    def counted(linear, bits):
        alive.append(sum(ref() is not None for ref in floats))
        return make(linear, bits)

    monkeypatch.setattr(QuantizedLinear, "from_linear", counted)
    quantize_linears(blocks, 8)
    assert alive == list(range(12, 0, -1))
    assert not any(ref() is not None for ref in floats)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("casts", [("half", "float"), ("bfloat16", "half"), ("double", "bfloat16", "float")])
def test_a_model_is_cast_in_any_order(golden_model, bits, casts):
    model = golden_model(f"int{bits}")
    weight = model.transformer.layers[0].mlp.dense_h_to_4h.weight.clone()
    for cast in casts:
        model = CASTS[cast](model)
    layer = model.transformer.layers[0].mlp.dense_h_to_4h
    assert torch.equal(layer.weight, weight)
    assert layer.weight_scale.dtype == model.dtype
    # The LM head was half at some time, and then stays so beside float32.
    half = {torch.float32: (torch.float16, torch.bfloat16)}.get(model.dtype, (model.dtype,))
    assert model.lm_head.weight.dtype in half
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    ids = torch.tensor([[7, 8, 9, 501, 504]])
    assert model(ids).logits.dtype == model.dtype


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_in_half_and_in_place_gives_the_golden_logits(golden_model, cases, bits):
    """The quantised golden model's outputs, from the float model quantised here."""
    model = golden_model("base", torch.float16).quantize(bits).float()
    expected = cases[f"int{bits}_single.logits"]
    with torch.no_grad():
        logits = model(cases[f"int{bits}_single.input_ids"]).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64)])
def test_an_output_may_be_changed_in_place(shape):
    layer = QuantizedLinear.from_linear(nn.Linear(64, 32), 8)
    x = torch.randn(shape, requires_grad=True)
    expected = torch.autograd.grad(layer(x).relu().sum(), x)[0]
    assert torch.equal(torch.autograd.grad(nn.functional.relu(layer(x), inplace=True).sum(), x)[0], expected)


def test_hooks_keep_what_a_layer_gave(golden_model):
    model, kept = golden_model("int8"), []

    def keep(module, given, output):
        if isinstance(output, torch.Tensor):
            kept.append((output, output.clone()))

    ids = torch.tensor([[7, 8, 9, 501, 504]])
    for register in (nn.modules.module.register_module_forward_hook, model.transformer.layers[0].register_forward_hook):
        with torch.no_grad():
            before = model(ids).logits
            hooks = [register(keep)]
            hooks += [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, QuantizedLinear)]
            torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
        for hook in hooks:
            hook.remove()
        assert len(kept) >= 4 * model.config.num_layers
        assert all(torch.equal(output, then) for output, then in kept)
        kept.clear()


@torch.no_grad()
def test_who_follows_what_pytorch_does(golden_model):
    """Fake tensors, tracing and counting meet operators of PyTorch, not kernels behind its back."""
    layer, x = QuantizedLinear.from_linear(nn.Linear(64, 32), 8).eval(), torch.randn(3, 5, 64)
    expected = layer(x)
    for traced in (make_fx(layer)(torch.randn(3, 5, 64)), torch.jit.trace(layer, (torch.randn(3, 5, 64),))):
        assert torch.equal(traced(x), expected)
    model, ids = golden_model("int8"), torch.tensor([[7, 8, 9, 501, 504]])
    with FlopCounterMode(display=False):
        torch.testing.assert_close(model(ids).logits, model(ids).logits)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        logits = model(mode.from_tensor(ids)).logits
    assert logits.shape == (1, 5, model.config.vocab_size)


def test_scales_in_float64():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 32), 8)
    x = torch.randn(3, 64)
    torch.testing.assert_close(copy.deepcopy(layer).double()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_a_half_head(dtype):
    torch.manual_seed(0)
    head, x, grad = HalfLinear(16, 33, dtype=dtype), torch.randn(5, 16, requires_grad=True), torch.randn(5, 33)
    head(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ head.weight.float())
    torch.testing.assert_close(head.weight.grad.float(), grad.T @ x.detach(), rtol=2**-7, atol=1e-2)


def test_embeddings_are_half_after_quantising(golden_model):
    model = golden_model("base", torch.float16).quantize(8).float()
    assert model.lm_head.weight.dtype == model.get_input_embeddings().weight.dtype == torch.float16


def test_compiled_layer():
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    layer = make_layer(16, 32)
    x = random_weight(3, 32).requires_grad_()
    expected = layer(x)
    (grad,) = torch.autograd.grad(expected.sum(), x)
    compiled = torch.compile(layer, fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], grad, rtol=1e-5, atol=1e-6)


# LoRA


def lora(model, **kwargs):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra `train`")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query_key_value"], **kwargs))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_over_int8(golden_model, cases, learn, checkpointing):
    base = golden_model("int8")
    frozen = {name: p.detach().clone() for name, p in base.named_parameters()}
    if checkpointing:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    model = lora(base, task_type="CAUSAL_LM").train()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    ids, labels = cases["base_labels.input_ids"], cases["base_labels.labels"]
    losses = learn(model, ids, labels, 1e-2, 12)
    assert losses[-1] < 0.9 * losses[0]
    after = {name.replace(".base_layer", ""): p for name, p in base.named_parameters() if "lora_" not in name}
    assert set(after) == set(frozen)
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert after["transformer.layers.0.attention.query_key_value.weight"].dtype == torch.int8


def test_checkpointing_does_not_change_lora_gradients(golden_model, cases):
    ids, labels = cases["base_labels.input_ids"], cases["base_labels.labels"]
    grads = []
    for checkpointing in (False, True):
        base = golden_model("int8")
        if checkpointing:
            base.gradient_checkpointing_enable()
            base.enable_input_require_grads()
        model = lora(base, init_lora_weights=False).train()
        model(input_ids=ids, labels=labels).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(grads[0]) == 6
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-7)


def test_second_derivatives_are_refused_by_kernels_that_lack_them(monkeypatch):
    layer = QuantizedLinear.from_linear(nn.Linear(8, 4), 8)
    x = torch.randn(3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)  # in plain PyTorch there are some
    grad.sum().backward()
    assert x.grad.abs().sum() > 0
    monkeypatch.setattr(quantization, "cuda_available", lambda device, dtype: True)
    monkeypatch.setattr(quantization, "cuda_product", quantization._plain_linear)
    monkeypatch.setattr(quantization, "cuda_input_gradient", quantization._plain_input_gradient)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(expected, grad.detach())
    with pytest.raises(RuntimeError, match=r"no second derivatives.*create_graph"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "multiply",
    [
        lambda h, w: h @ w.T,
        lambda h, w: (w @ h.T).T,
        nn.functional.linear,
        lambda h, w: torch.einsum("mk,nk->mn", h, w),
        lambda h, w: torch.matmul(h, w.transpose(0, 1)),
    ],
)
def test_a_half_head_can_be_multiplied_beside_float32(golden_model, multiply):
    model = golden_model("int8")
    model._keep_embeddings_half()
    weight = model.lm_head.weight
    assert weight.dtype == torch.float16
    assert isinstance(weight, nn.Parameter)
    assert weight is model.transformer.word_embeddings.weight
    h = torch.randn(3, weight.shape[1])
    torch.testing.assert_close(multiply(h, weight), multiply(h, weight.detach().float()), rtol=1e-5, atol=1e-5)
    assert multiply(h.half(), weight).dtype == torch.float16  # half beside half stays half
    assert type(model.state_dict()["lm_head.weight"]) is torch.Tensor


def test_new_tokens_are_trained_over_a_half_embedding(golden_model, cases):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra `train`")
    ids, labels = cases["base_labels.input_ids"], cases["base_labels.labels"]
    model = golden_model("int8")
    model._keep_embeddings_half()
    expected = model(input_ids=ids, labels=labels).loss.item()
    token = int(ids[0, 0])
    config = peft.LoraConfig(target_modules=["query_key_value"], trainable_token_indices=[token])
    tuned = peft.get_peft_model(model, config)
    loss = tuned(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    (delta,) = [parameter for name, parameter in tuned.named_parameters() if "trainable_tokens_delta" in name]
    assert delta.grad.dtype == delta.dtype
    assert delta.grad.abs().sum() > 0
