"""Which path serves which call."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from chatglm_int8 import modeling_chatglm, ops
from chatglm_int8.ops import Path, path
from chatglm_int8.quantization import QuantizedLinear


@pytest.fixture
def on_cuda(monkeypatch) -> list[str]:
    """Calls of the CUDA kernels for tensors that are on the CPU; names of the kernels in their order."""
    called = []

    def norm(x, *given):
        called.append("norm")
        return x

    def norm_linear(x, weight, bias, epsilon, *given):
        called.append("norm_linear")
        return x, x.new_zeros(*x.shape[:-1], len(given[0]))

    monkeypatch.setattr(ops, "path", lambda module, x: Path.CUDA)
    monkeypatch.setattr(ops, "cuda_layer_norm", norm)
    monkeypatch.setattr(ops, "cuda_norm_linear", norm_linear)
    monkeypatch.setattr(ops, "cuda_product", lambda x, weight, *given: x.new_zeros(*x.shape[:-1], len(weight)))
    return called


@pytest.mark.parametrize(
    ("device", "dtype", "autocast", "training", "gradients", "expected"),
    [
        ("cuda", torch.float16, False, False, False, Path.CUDA),
        ("cuda", torch.float32, False, False, False, Path.TORCH),
        ("cuda", torch.float16, False, True, False, Path.TORCH),
        ("cuda", torch.float16, False, False, True, Path.TORCH),
        ("cuda", torch.float32, True, True, True, Path.AUTOCAST),
        ("cuda", torch.float16, True, False, False, Path.AUTOCAST),
        ("cuda", torch.float64, True, False, False, Path.TORCH),
        ("cpu", torch.float32, False, False, False, Path.CPU),
        ("cpu", torch.bfloat16, False, False, False, Path.CPU),
        ("cpu", torch.float64, False, False, False, Path.TORCH),
        ("cpu", torch.float32, False, True, False, Path.TORCH),
        ("cpu", torch.float32, False, False, True, Path.TORCH),
        ("meta", torch.float32, False, False, False, Path.TORCH),
    ],
)
def test_the_table_of_paths(monkeypatch, device, dtype, autocast, training, gradients, expected):
    class Activation:  # there may be no GPU
        def __init__(self):
            self.device, self.dtype = torch.device(device), dtype

    monkeypatch.setattr(ops, "cuda_available", lambda device, dtype: dtype in (torch.float16, torch.bfloat16))
    monkeypatch.setattr(ops, "autocast_dtype", lambda kind: torch.float16 if autocast else None)
    with torch.set_grad_enabled(gradients):
        assert path(nn.Linear(2, 2).train(training), Activation()) is expected


def test_what_follows_pytorch_sees_all_of_it():
    class Follower(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    x, module = torch.zeros(1, 2), nn.Linear(2, 2).eval()
    with torch.no_grad():
        assert path(module, x) is Path.CPU
        with Follower():
            assert path(module, x) is Path.TORCH


def test_a_norm_goes_with_its_product_only_where_neither_is_watched(golden_model, on_cuda):
    """A hook has to see what its module takes and gives, and an offloaded weight is not there to be asked about."""
    block = golden_model("int8").transformer.layers[0]
    x = torch.zeros(1, 1, block.input_layernorm.normalized_shape[0])
    norm = block.input_layernorm
    for module, linear in ((block.attention, "query_key_value"), (block.mlp, "dense_h_to_4h")):
        for watched in (module, getattr(module, linear)):
            modeling_chatglm._enter(norm, module, x)
            assert on_cuda == ["norm_linear"]
            on_cuda.clear()
            hook = watched.register_forward_pre_hook(lambda *given: None)
            modeling_chatglm._enter(norm, module, x)
            assert on_cuda == ["norm"]
            hook.remove()
            on_cuda.clear()
            watched.forward = watched.forward  # as accelerate does
            modeling_chatglm._enter(norm, module, x)
            assert on_cuda == ["norm"]
            del watched.forward
            on_cuda.clear()
    _, product = modeling_chatglm._enter(norm, nn.Sequential(block.mlp), x)
    assert on_cuda == ["norm"] and product is None


@pytest.mark.parametrize("width", [192, 190, 16392])
def test_a_norm_of_a_width_that_no_kernel_takes(on_cuda, width):
    norm, linear = nn.LayerNorm(width).eval(), QuantizedLinear(width, 8).eval()
    normed, product = ops.norm_linear(norm, linear, torch.randn(2, width))
    assert on_cuda == (["norm_linear"] if width == 192 else [])
    assert normed.shape == (2, width) and product.shape == (2, 8)
