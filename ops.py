"""The door to the kernels: what the network computes with, each call on the fastest path that serves it.

| path | device | activations | mode |
|---|---|---|---|
| `CUDA` | NVIDIA GPU with kernels | half, bfloat16 | evaluation, no gradients, no autocast |
| `AUTOCAST` | NVIDIA GPU with kernels | float32 or autocast's dtype | autocast to half or bfloat16 |
| `CPU` | CPU | float32, half, bfloat16 | evaluation, no gradients |
| `TORCH` | any | any | the rest: training, float64, other devices; under torch.compile, tracing and dispatch modes |

On `TORCH` the modules are called as they are. So is a module with hooks or of another type (an adapter around it, say)
on every path: a kernel may replace only what it computes. A kernel that can't take a shape falls back to PyTorch.

Letters as in `modeling_chatglm`.
"""

import enum

import torch
from torch import nn

from .kernels_cpu import library as cpu_library
from .kernels_cuda import available as cuda_available
from .kernels_cuda import input_gradient as cuda_input_gradient
from .kernels_cuda import layer_norm as cuda_layer_norm
from .kernels_cuda import norm_linear as cuda_norm_linear
from .kernels_cuda import product as cuda_product
from .kernels_cuda import rotate as cuda_rotate
from .kernels_cuda import training_norm as cuda_training_norm
from .kernels_cuda import training_norm_gradient as cuda_training_norm_gradient
from .quantization import HalfLinear, QuantizedLinear, autocast_dtype, check_first_derivative, is_traced

_WIDEST_NORM = 16384  # columns; the CUDA kernels take multiples of 8 up to here


class Path(enum.Enum):
    """See the table above."""

    CUDA = enum.auto()
    AUTOCAST = enum.auto()
    CPU = enum.auto()
    TORCH = enum.auto()


def path(module: nn.Module, x: torch.Tensor) -> Path:
    """The path of a module's call with x."""
    if is_traced():
        return Path.TORCH
    kind = x.device.type
    cast_to = autocast_dtype(kind)
    if kind == "cuda" and cast_to is not None:
        takes = x.dtype in (torch.float32, cast_to) and cuda_available(x.device, cast_to)
        return Path.AUTOCAST if takes else Path.TORCH
    # In training, checkpointing may compute without gradients what it computes again with them.
    if module.training or torch.is_grad_enabled():
        return Path.TORCH
    if kind == "cuda":
        return Path.CUDA if cuda_available(x.device, x.dtype) else Path.TORCH
    return Path.CPU if kind == "cpu" and x.dtype != torch.float64 else Path.TORCH


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks, or a `forward` put in by accelerate, see the module's input or output."""
    own = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return bool(own or nn.modules.module._has_any_global_hook())


def _is_bare(module: nn.Module, kind: type) -> bool:
    """Whether calling the module is the forward of `kind` and nothing else."""
    return type(module) is kind and not has_hooks(module)


def _may_be_kept(module: nn.Module) -> bool:
    """Whether a hook may have kept the module's output, which then must not be changed in place."""
    return bool(module._forward_hooks or nn.modules.module._has_any_global_hook())


# --- Products ---


def linear(
    module: nn.Module, x: torch.Tensor, gelu: bool = False, residual: torch.Tensor | None = None, alpha: float = 1.0
) -> torch.Tensor:
    """`module(x)`, then GELU (tanh form) or + alpha · residual: [..., K] → [..., N]."""
    way = path(module, x)
    if way is Path.CUDA:
        weights = None
        if _is_bare(module, QuantizedLinear):
            weights = module.weights()
        elif _is_bare(module, HalfLinear) and x.numel() == x.shape[-1] and module.weight.dtype == x.dtype:
            weights = module.weight, None, module.bias, 16
        if weights is not None:
            return cuda_product(x, *weights, gelu, residual, alpha)
    elif way is Path.AUTOCAST and residual is not None and _adds(module, x, residual):
        return _ResidualProduct.apply(x.to(autocast_dtype("cuda")), residual, module.weights(), alpha)
    y = module(x)
    if gelu:
        y = _gelu(y, in_place=way is Path.CPU and not _may_be_kept(module))
    if residual is None:
        return y
    # Autocast may have given the product another dtype than activations have between blocks.
    y = y if residual.dtype == torch.float32 else y.to(residual.dtype)
    return torch.add(y, residual, alpha=alpha)


def _gelu(y: torch.Tensor, in_place: bool) -> torch.Tensor:
    if in_place and y.is_contiguous() and cpu_library() is not None:
        return cpu_library().gelu_(y)
    return nn.functional.gelu(y, approximate="tanh")


def _adds(module: nn.Module, x: torch.Tensor, residual: torch.Tensor) -> bool:
    """Whether `_ResidualProduct` can stand for `module(x)` and the sum."""
    return (
        residual.dtype == torch.float32
        and _is_bare(module, QuantizedLinear)
        and not module.trains_bias()
        and x.shape[-1] == module.in_features
    )


class _ResidualProduct(torch.autograd.Function):
    """x [..., K] · (q · scale)ᵀ + bias + alpha · residual on a GPU, float32 [..., N]."""

    @staticmethod
    def forward(ctx, x, residual, weights, alpha):
        ctx.weights, ctx.alpha, ctx.dtype = weights, alpha, x.dtype
        return cuda_product(x, *weights, residual=residual, alpha=alpha)

    @staticmethod
    def backward(ctx, grad_y):
        weight, scale, _, bits = ctx.weights
        needs_x, needs_residual, *_ = ctx.needs_input_grad
        rounded = grad_y.to(ctx.dtype).contiguous()
        check_first_derivative(rounded)
        grad_x = cuda_input_gradient(rounded, weight, scale, bits) if needs_x else None
        return grad_x, grad_y * ctx.alpha if needs_residual else None, None, None, None


# --- LayerNorm ---


def layer_norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """`norm(x)` over the last dimension."""
    if path(norm, x) is Path.CUDA and _norm_fits(norm, x) and norm.weight.dtype == x.dtype:
        return cuda_layer_norm(x, norm.weight, norm.bias, norm.eps)
    return norm(x)


def norm_linear(
    norm: nn.LayerNorm, module: nn.Module, x: torch.Tensor, gelu: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm(x)`, and `linear(module, norm(x), gelu)`."""
    way = path(norm, x)
    if way is Path.CUDA and _is_bare(module, QuantizedLinear) and not module.training:
        if _norm_fits(norm, x) and norm.weight.dtype == x.dtype:
            return cuda_norm_linear(x, norm.weight, norm.bias, norm.eps, *module.weights(), gelu)
    elif way is Path.AUTOCAST and _rounds(norm, module, x):
        normed, rounded = _TrainingNorm.apply(x, norm.weight, norm.bias, norm.eps, autocast_dtype("cuda"))
        return normed, linear(module, rounded, gelu)
    normed = layer_norm(norm, x)
    return normed, linear(module, normed, gelu)


def _norm_fits(norm: nn.LayerNorm, x: torch.Tensor) -> bool:
    """Whether the CUDA kernels take this LayerNorm: bare, with a bias, of a width that 16-byte reads fit."""
    width, weight, bias = x.shape[-1], norm.weight, norm.bias
    return (
        bias is not None
        and _is_bare(norm, nn.LayerNorm)
        and width % 8 == 0
        and width <= _WIDEST_NORM
        and weight.device == bias.device == x.device
        and (x.data_ptr() | weight.data_ptr() | bias.data_ptr()) % 16 == 0
    )


def _rounds(norm: nn.LayerNorm, module: nn.Module, x: torch.Tensor) -> bool:
    """Whether `_TrainingNorm` can stand for `norm(x)`: a frozen LayerNorm before a quantised linear, which takes the
    rounded result, perhaps with an adapter of PEFT around it."""
    weight, bias = norm.weight, norm.bias
    inner = getattr(module, "base_layer", module)  # PEFT's name
    return (
        isinstance(inner, QuantizedLinear)
        and _norm_fits(norm, x)
        and not (weight.requires_grad or bias.requires_grad)
        and weight.dtype == bias.dtype
        and weight.dtype in (torch.float32, autocast_dtype("cuda"))
    )


class _TrainingNorm(torch.autograd.Function):
    """LayerNorm under autocast: float32, and the same rounded for the product that follows."""

    @staticmethod
    def forward(ctx, x, weight, bias, epsilon, dtype):
        ctx.save_for_backward(x)
        ctx.others = weight, epsilon
        return cuda_training_norm(x, weight, bias, epsilon, dtype)

    @staticmethod
    def backward(ctx, grad_normed, grad_rounded):
        check_first_derivative(grad_rounded)
        (x,) = ctx.saved_tensors
        return cuda_training_norm_gradient(x, *ctx.others, grad_normed, grad_rounded), None, None, None, None


# --- Attention. Without a kernel for them, these return None, and the caller computes with PyTorch. ---


class _Rotation(torch.autograd.Function):
    """The rotation of qkv [B, S, H, 3·D] by one CUDA kernel, and its gradient, the rotation back."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, back):  # a setup_context beside it would take longer than the launch
        ctx.angles, ctx.back = (cos, sin), back
        return cuda_rotate(qkv, cos, sin, back)

    @staticmethod
    def backward(ctx, grad):
        return _Rotation.apply(grad, *ctx.angles, not ctx.back), None, None, None


def rotate(module: nn.Module, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
    """qkv with its queries and keys rotated.

    Args:
        module: the linear that made qkv. On a CPU qkv is overwritten unless a hook may have kept it.
        qkv: [B, S, H, 3·D], per head D queries, D keys, D values.
        cos, sin: [B, S, 1, R, D/R].
    """
    if path(module, qkv) is Path.CPU:
        library = cpu_library()
        if library is None or not library.can_rotate(qkv, cos, sin):
            return None
        return library.rotary_(qkv.clone() if _may_be_kept(module) else qkv, cos, sin)
    by_kernel = (  # with gradients, too
        qkv.is_cuda
        and not is_traced()
        and cos.device == qkv.device
        and cos.dtype == sin.dtype == qkv.dtype
        and cos.shape[-1] % 16 == 0
        and cuda_available(qkv.device, qkv.dtype)
    )
    return _Rotation.apply(qkv, cos, sin, False) if by_kernel else None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor | None:
    """Attention on the CPU path: query [B, H, S, D], key and value [B, H, T, D], additive mask → [B, S, H, D]."""
    library = cpu_library()
    if library is None or not library.can_attend(query, key, value, mask):
        return None
    return library.attention(query, key, value, mask, scaling)
