"""INT8 and INT4 linears, and the small operations of a decoding step, on NVIDIA GPUs.

Calls of the kernels in `kernels/cuda`: each has a struct of arguments here, with the fields of the struct of the same
name there. `cuda_plans` chooses kernels and launches, `cuda_runtime` compiles and launches.

Letters: M rows of an activation, K in_features, N out_features, B batch, H heads, D head width, T places in a cache.

Activations are float16 or bfloat16, sums are float32. Needs compute capability 7.0, for bfloat16 8.0. Without
cpm_kernels, NVRTC or a driver, `available` says why, once, and the caller goes on in PyTorch.
"""

import ctypes
import functools
import os
import threading
import warnings

import torch

from .cuda_plans import MAX_SMALL_M, MODULES, Plan, hopper_plan, linear_plan
from .cuda_runtime import get_arrivals, launch, load, load_libraries, properties

_REMEDY = (
    "Install what is missing (pip install cpm_kernels; NVRTC comes with PyTorch's CUDA wheels or the CUDA toolkit), or "
    "go on without: PyTorch computes the same, more slowly."
)
_lock = threading.RLock()


# --- Arguments of the kernels ---

_INT, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
TensorMap = ctypes.c_uint64 * 16  # a CUtensorMap


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Epilogue(ctypes.Structure):
    _fields_ = [*_fields(_POINTER, "scale bias residual y"), ("alpha", _FLOAT), ("gelu", _INT)]


class Norm(ctypes.Structure):
    _fields_ = [*_fields(_POINTER, "norm_weight norm_bias normed"), ("epsilon", _FLOAT)]


class LinearM1(ctypes.Structure):
    _anonymous_ = ("epilogue", "norm")
    _fields_ = [*_fields(_POINTER, "weight x"), ("epilogue", Epilogue), ("norm", Norm), *_fields(_INT, "N K")]


class LinearM8(ctypes.Structure):
    _anonymous_ = ("epilogue",)
    _fields_ = [*_fields(_POINTER, "weight x"), ("epilogue", Epilogue), *_fields(_INT, "M N K")]


class LinearM16(ctypes.Structure):
    _anonymous_ = ("epilogue", "norm")
    _fields_ = [*_fields(_POINTER, "weight x"), ("epilogue", Epilogue), ("norm", Norm), *_fields(_INT, "M N K")]


class LinearTiles(ctypes.Structure):
    _anonymous_ = ("epilogue",)
    _fields_ = [*_fields(_POINTER, "weight x"), ("epilogue", Epilogue)]
    _fields_ += [*_fields(_POINTER, "partials arrivals"), *_fields(_INT, "M N K")]


class LinearSmallM(ctypes.Structure):
    _anonymous_ = ("epilogue",)
    _fields_ = [*_fields(TensorMap, "weight x"), ("epilogue", Epilogue), *_fields(_INT, "M N K stages")]
    _fields_ += [("padding_to_64", _INT * 2)]  # the alignment of a tensor map


class LinearLargeM(ctypes.Structure):
    _anonymous_ = ("epilogue",)
    _fields_ = [*_fields(TensorMap, "weight x"), ("epilogue", Epilogue), *_fields(_INT, "M N K residual_is_float")]
    _fields_ += [("padding_to_64", _INT * 2)]


class Expand(ctypes.Structure):
    _fields_ = [*_fields(_POINTER, "weight scale y"), *_fields(_INT, "N K")]


class LayerNorm(ctypes.Structure):
    _fields_ = [*_fields(_POINTER, "x weight bias y"), ("epsilon", _FLOAT), ("K", _INT)]


class NormForward(ctypes.Structure):
    _fields_ = [*_fields(_POINTER, "x weight bias y rounded"), ("epsilon", _FLOAT)]
    _fields_ += _fields(_INT, "x_is_float weight_is_float K")


class NormBackward(ctypes.Structure):
    _fields_ = [*_fields(_POINTER, "x weight grad_y grad_rounded grad_x"), ("epsilon", _FLOAT)]
    _fields_ += _fields(_INT, "x_is_float weight_is_float K")


class BeginStep(ctypes.Structure):
    _fields_ = _fields(_POINTER, "ids embedding frequencies positions hidden cosines sines") + _fields(_INT, "width R")


class EndStep(ctypes.Structure):
    _fields_ = _fields(_POINTER, "positions advance slots") + _fields(_INT, "B R")


class DecodeAttention(ctypes.Structure):
    _fields_ = _fields(_POINTER, "qkv cosines sines keys values slots padding y partials arrivals")
    _fields_ += _fields(_INT, "H T R prefix max_parts")


class SplitRotate(ctypes.Structure):
    _fields_ = _fields(_POINTER, "qkv cosines sines queries keys values") + _fields(_INT, "B S H D R T place")


class Rotate(ctypes.Structure):
    _fields_ = [*_fields(_POINTER, "qkv cosines sines y"), ("sign", _FLOAT), *_fields(_INT, "tokens H D R")]


def _addresses(**tensors: torch.Tensor | None) -> dict[str, int | None]:
    return {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}


# --- Availability ---

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
    architecture, *_ = properties(device)
    bf16 = dtype == torch.bfloat16
    turned_off = os.environ.get("CHATGLM_CUDA_KERNEL") == "0"
    if turned_off or architecture < (80 if bf16 else 70):
        return False
    try:
        load([MODULES[name] for name in ("linear_m1_8", "linear_m1_16", "prompt", "step_128")], bf16, device)
    except Exception as error:
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        warnings.warn(f"The CUDA kernels of chatglm_int8 can't be used: {reason}. {_REMEDY}", stacklevel=2)
        return False
    return True


# --- Linears ---


def expand(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The float weight q · scale [N, K], of the scales' dtype, of int8 [N, K] (INT4: [N, K/2]) and scales [N]."""
    n, k = weight.shape[0], weight.shape[1] * 8 // bits
    out = torch.empty(n, k, dtype=scale.dtype, device=weight.device)
    threads = -(-k // 8)
    block = min(256, -(-threads // 32) * 32)
    grid = (-(-threads // block), min(-(-n // 4) if k % 8 == 0 else n, 65535), 1)
    arguments = Expand(**_addresses(weight=weight, scale=scale, y=out), N=n, K=k)
    launch(out, MODULES["prompt"], f"expand_{bits}", grid, block, 0, arguments)
    return out


@functools.lru_cache(maxsize=4096)
def _tensor_map(address: int, rows: int, row_bytes: int, box_rows: int, box_bytes: int) -> ctypes.Array:
    """The `TensorMap` of a matrix of bytes, for TMA: swizzled boxes, zeros beyond the edges."""
    cuda = load_libraries().cuda
    memory = ctypes.create_string_buffer(192)
    tensor_map = (ctypes.c_char * 128).from_buffer(memory, -ctypes.addressof(memory) % 64)
    pair, strides = ctypes.c_uint32 * 2, (ctypes.c_uint64 * 1)(row_bytes)
    sizes, box, steps = (ctypes.c_uint64 * 2)(row_bytes, rows), pair(box_bytes, box_rows), pair(1, 1)
    # Bytes (0), 2 dimensions, not interleaved (0), the L2 cache fetches 128 bytes (2), zeros beyond the edges (0).
    given = (0, 2, ctypes.c_void_p(address), sizes, strides, box, steps, 0, {32: 1, 64: 2, 128: 3}[box_bytes], 2, 0)
    cuda.checkCUStatus(cuda.cuda._Lib__lib.cuTensorMapEncodeTiled(ctypes.byref(tensor_map), *given))
    return TensorMap.from_buffer_copy(tensor_map)


@functools.cache
def _hopper_has(n: int, k: int, row_bytes: int, device: int) -> bool:
    """Whether there is a kernel for Hopper for a product of these widths there."""
    architecture, *_ = properties(device)
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
    """The plan for a weight [rows, row_bytes] at the address `weight`, and its arguments but for x and the epilogue."""
    bits = 8 if kernel == "input_gradient" else row_bytes * 8 // k
    plan = hopper_plan(kernel, m, n, k, bits, device)
    given = {"weight": _tensor_map(weight, rows, row_bytes, *plan.weight_box), "M": m, "N": n, "K": k}
    if kernel == "linear_small_m":
        return plan, LinearSmallM(**given, stages=plan.stages)
    return plan, LinearLargeM(**given)


def _linear_on_hopper(
    kernel: str, m: int, x, weight, y, scale, bias=None, residual=None, alpha=0.0, gelu=False
) -> torch.Tensor:
    """Launch linear_small_m, linear_large_m or input_gradient: y [..., N] of M rows of x [..., K]; returns y."""
    k, n, (rows, row_bytes) = x.shape[-1], y.shape[-1], weight.shape
    plan, arguments = _hopper_launch(kernel, m, n, k, weight.data_ptr(), rows, row_bytes, x.get_device())
    arguments = type(arguments).from_buffer_copy(arguments)
    arguments.x = _tensor_map(x.data_ptr(), m, k * 2, plan.tile_m, 128)
    arguments.scale, arguments.y = scale.data_ptr(), y.data_ptr()
    if bias is not None:
        arguments.bias = bias.data_ptr()
    if residual is not None:
        arguments.residual = residual.data_ptr()
    arguments.alpha, arguments.gelu = alpha, gelu
    if y.dtype == torch.float32:
        arguments.residual_is_float = True
    launch(x, plan.module, plan.kernel, plan.grid, plan.block, plan.shared, arguments)
    return y


def _aligned_plan(m: int, x: torch.Tensor, weight: torch.Tensor, bits: int) -> Plan | None:
    """The plan for M rows x [..., K], if x and the weight can be read 16 bytes at a time."""
    if (x.data_ptr() | weight.data_ptr()) % 16 or not weight.is_contiguous():
        return None
    return linear_plan(m, weight.shape[0], x.shape[-1], bits, x.get_device())


_ARGUMENTS = {"linear_m1": LinearM1, "linear_m8": LinearM8, "linear_m16": LinearM16, "linear_tiles": LinearTiles}


def _launch_linear(plan: Plan, m: int, x, weight, scale, bias, residual, alpha, gelu, norm=None) -> torch.Tensor:
    """Launch a plan for M rows x [..., K]: y [..., N].

    norm: weight, bias and epsilon of a LayerNorm of x before the product, and where to store its result [..., K].
    """
    n, k = weight.shape[0], x.shape[-1]
    y = x.new_empty(*x.shape[:-1], n)
    given = _addresses(weight=weight, x=x, scale=scale, bias=bias, residual=residual, y=y)
    given |= {"alpha": alpha, "gelu": gelu, "N": n, "K": k}
    if m > 1:
        given["M"] = m
    shared, partials = plan.shared, None
    if norm is not None:
        norm_weight, norm_bias, given["epsilon"], normed = norm
        given |= _addresses(norm_weight=norm_weight, norm_bias=norm_bias, normed=normed)
        shared = plan.norm_shared
    if plan.partials:
        partials = torch.empty(plan.partials, dtype=torch.float32, device=x.device)
        given |= _addresses(partials=partials, arrivals=get_arrivals(x.device))
    launch(x, plan.module, plan.kernel, plan.grid, plan.block, shared, _ARGUMENTS[plan.kernel](**given))
    return y


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
    if is_wide and not (on_hopper and m > MAX_SMALL_M and residual.dtype == torch.float32):
        return product(x, weight, scale, bias, bits).add(residual, alpha=alpha)
    scale, bias = _of_dtype(scale, x.dtype), _of_dtype(bias, x.dtype)
    shape = (*x.shape[:-1], n)
    if m == 0:
        return x.new_empty(shape)
    if on_hopper:
        kernel = "linear_small_m" if m <= MAX_SMALL_M else "linear_large_m"
        y = torch.empty_like(residual) if is_wide else x.new_empty(shape)
        return _linear_on_hopper(kernel, m, x, weight, y, scale, bias, residual, alpha, gelu)
    plan = _aligned_plan(m, x, weight, bits)
    if plan is not None:
        return _launch_linear(plan, m, x, weight, scale, bias, residual, alpha, gelu)
    wide = weight if bits == 16 else expand(weight.contiguous(), scale, bits)
    if gelu and bias is not None:
        y = torch._addmm_activation(bias, x.view(m, k), wide.T, use_gelu=True)  # in its tanh form, on a GPU
        return y.view(shape)
    y = torch.nn.functional.linear(x, wide, bias)
    y = torch.nn.functional.gelu(y, approximate="tanh") if gelu else y
    return y if residual is None else y.add_(residual, alpha=alpha)


def _of_dtype(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return x if x is None or x.dtype == dtype else x.to(dtype)


def takes_norm(x: torch.Tensor, weight: torch.Tensor, bits: int) -> bool:
    """Whether one kernel can normalise the rows of x [..., K] and multiply them by this weight."""
    m = x.numel() // x.shape[-1]
    if m == 0 or _suits_hopper(m, x, weight, weight.shape[0]):
        return False
    plan = _aligned_plan(m, x, weight, bits)
    return plan is not None and plan.norm_shared is not None


def norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    epsilon: float,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    gelu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`layer_norm` of x [..., K], and the `product` of that: one kernel where there is one, else two.

    Returns:
        normed [..., K], y [..., N].
    """
    x = x.contiguous()
    if not takes_norm(x, weight, bits):
        normed = layer_norm(x, norm_weight, norm_bias, epsilon)
        return normed, product(normed, weight, scale, bias, bits, gelu)
    m, normed = x.numel() // x.shape[-1], torch.empty_like(x)
    scale, bias, norm = _of_dtype(scale, x.dtype), _of_dtype(bias, x.dtype), (norm_weight, norm_bias, epsilon, normed)
    plan = _aligned_plan(m, x, weight, bits)
    return normed, _launch_linear(plan, m, x, weight, scale, bias, None, 1.0, gelu, norm)


def input_gradient(grad_y: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The gradient [..., K] of a `product`'s x, for that of its output [..., N]; both half or bfloat16."""
    n, k = weight.shape
    m = grad_y.numel() // n
    scale = _of_dtype(scale, grad_y.dtype)
    if bits == 8 and m > MAX_SMALL_M and n % 64 == 0 and _suits_hopper(m, grad_y, weight, k, scale):
        grad_x = grad_y.new_empty(*grad_y.shape[:-1], k)
        return _linear_on_hopper("input_gradient", m, grad_y, weight, grad_x, scale)
    return grad_y @ expand(weight.contiguous(), scale, bits)


# --- LayerNorm ---


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    """LayerNorm over the last of x's dimensions, K; K ≤ 16384 and a multiple of 8."""
    x = x.contiguous()
    y = torch.empty_like(x)
    k = x.shape[-1]
    arguments = LayerNorm(**_addresses(x=x, weight=weight, bias=bias, y=y), epsilon=epsilon, K=k)
    launch(x, MODULES["prompt"], "layer_norm", (x.numel() // k, 1, 1), 512, k * 2, arguments)
    return y


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, contiguous and 16-byte aligned."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _launch_training_norm(name: str, kind: type, like: torch.Tensor, x, weight, epsilon: float, **tensors) -> None:
    """Launch a kernel of the module training."""
    k, numel = x.shape[-1], x.numel()
    if numel:
        eighths = 1 if k <= 4096 else 2 if k <= 8192 else 4  # of a row, in the registers of a thread
        given = _addresses(x=x, weight=weight, **tensors)
        are_float = {"x_is_float": x.dtype == torch.float32, "weight_is_float": weight.dtype == torch.float32}
        arguments = kind(**given, epsilon=epsilon, **are_float, K=k)
        launch(like, MODULES["training"], f"{name}_{eighths}", (numel // k, 1, 1), 512, 0, arguments)


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
    _launch_training_norm("norm_forward", NormForward, rounded, x, weight, epsilon, bias=bias, y=y, rounded=rounded)
    return y, rounded


def training_norm_gradient(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, grad_y: torch.Tensor, grad_rounded: torch.Tensor
) -> torch.Tensor:
    """The gradient of x, of its dtype, for those of the results of `training_norm`."""
    x, grad_y, grad_rounded = _aligned(x), _aligned(grad_y), _aligned(grad_rounded)
    grad_x = torch.empty_like(x)
    tensors = {"grad_y": grad_y, "grad_rounded": grad_rounded, "grad_x": grad_x}
    _launch_training_norm("norm_backward", NormBackward, grad_rounded, x, weight, epsilon, **tensors)
    return grad_x


# --- A decoding step ---


def begin_step(ids, embedding, positions, frequencies, head_dim: int) -> tuple:
    """Embeddings [B, hidden] of ids [B], and fp32 cosines and sines [B, D] of int64 positions [B, R].

    `frequencies` are fp32 [D / 2R].
    """
    (batch, rows), width = positions.shape, embedding.shape[1]
    hidden = torch.empty(batch, width, dtype=embedding.dtype, device=embedding.device)
    cosines, sines = torch.empty(2, batch, head_dim, dtype=torch.float32, device=embedding.device)
    given = _addresses(ids=ids, embedding=embedding, frequencies=frequencies, positions=positions)
    given |= _addresses(hidden=hidden, cosines=cosines, sines=sines)
    arguments = BeginStep(**given, width=width, R=rows)
    launch(hidden, MODULES[f"step_{head_dim}"], "begin_step", (batch, 1, 1), 256, 0, arguments)
    return hidden, cosines, sines


def end_step(like: torch.Tensor, positions, advance, slots, head_dim: int) -> None:
    """positions += advance, both int64 [B, R]; slots += 1, int32 [B]."""
    batch, rows = positions.shape
    arguments = EndStep(**_addresses(positions=positions, advance=advance, slots=slots), B=batch, R=rows)
    launch(like, MODULES[f"step_{head_dim}"], "end_step", (1, 1, 1), 256, 0, arguments)


def attend(qkv, cosines, sines, keys, values, slots, padding, prefix: int, rows: int, most: int) -> torch.Tensor:
    """Attention of one token for each of B sequences, whose keys and values are stored at places `slots` of the caches.

    Args:
        qkv: [B, H · 3 · D], per head D queries, D keys, D values, not rotated.
        cosines, sines: of `begin_step`.
        keys, values: caches [B, H, T, D], filled before the slots.
        slots: int32 [B].
        padding: int32 [B]: so many places after the first `prefix` are masked.
        rows: of positions, R.
        most: parts of the keys at most, which run at the same time; up to `cuda_plans.MAX_PARTS`.

    Returns:
        [B, H · D].
    """
    batch, heads, places, head_dim = keys.shape
    out = torch.empty(batch, heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    partials = torch.empty(batch * heads * most * (head_dim + 2), dtype=torch.float32, device=qkv.device)
    given = _addresses(qkv=qkv, cosines=cosines, sines=sines, keys=keys, values=values, slots=slots, padding=padding)
    given |= _addresses(y=out, partials=partials, arrivals=get_arrivals(qkv.device))
    arguments = DecodeAttention(**given, H=heads, T=places, R=rows, prefix=prefix, max_parts=most)
    # Of the first, which has more keys in flight, two blocks fit a multiprocessor.
    name = "attend_step" if most * batch * heads <= 2 * properties(qkv.get_device())[1] else "attend_many"
    grid = (min(most, -(-places // 64)), batch * heads, 1)
    launch(qkv, MODULES[f"step_{head_dim}"], name, grid, 256, 0, arguments)
    return out


# --- Rotary positions of a prompt ---


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
    given = _addresses(qkv=qkv, cosines=cosines, sines=sines, queries=queries, keys=keys, values=values)
    given |= {"B": batch, "S": length, "H": heads, "D": head_dim, "R": cosines.shape[-2], "T": keys.shape[2]}
    blocks = -(-qkv.numel() // 3 // 8 // 256)
    launch(qkv, MODULES["prompt"], "split_rotate", (blocks, 1, 1), 256, 0, SplitRotate(**given, place=place))
    return queries.transpose(1, 2)


def rotate(qkv: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, back: bool = False) -> torch.Tensor:
    """qkv [B, S, H, 3 · D] with its queries and keys rotated by `rotary_embedding` of its dtype, [B, S, 1, R, D / R];
    or rotated back, as gradients are."""
    batch, length, heads, triple = qkv.shape
    qkv, cosines, sines = _aligned(qkv), cosines.contiguous(), sines.contiguous()
    out = torch.empty_like(qkv)
    given = _addresses(qkv=qkv, cosines=cosines, sines=sines, y=out)
    given |= {"tokens": batch * length, "H": heads, "D": triple // 3, "R": cosines.shape[-2]}
    blocks = -(-qkv.numel() // 16 // 256)
    launch(qkv, MODULES["prompt"], "rotate", (blocks, 1, 1), 256, 0, Rotate(**given, sign=-1.0 if back else 1.0))
    return out
