"""INT8 and INT4 weights: how they are made, stored and multiplied.

Letters: M rows of an activation, K in_features, N out_features.

A weight [N, K] is stored as int8 with one scale per output row: `scale[n] = max|W[n, :]| / (2^(bits-1) - 1)`,
`q = round(W / scale)`. INT4 packs two columns in a byte, the even column in the high nibble, both in two's
complement, so that its weight is [N, K/2]. This is the storage of the published ChatGLM-6B-INT8 and -INT4.

The arithmetic is plain PyTorch, which runs on any device, and is replaced by compiled kernels where there are some.
"""

import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .kernels_cpu import MAX_HALF_ROWS
from .kernels_cpu import library as cpu_library
from .kernels_cuda import available as cuda_available
from .kernels_cuda import input_gradient as cuda_input_gradient
from .kernels_cuda import product as cuda_product

# On a CPU the float copy of a weight is made in slices of at most this many numbers: 8 MB of fp32 stay in the cache,
# and are memory that the allocator has at hand. Elsewhere slices are 32 times as large, to keep launches few.
_SLICE_NUMEL = 1 << 21


def check_bits(bits: int) -> None:
    """Raise a ValueError unless `bits` is a width that the blocks' weights can have, 4 or 8."""
    if bits not in (4, 8):
        raise ValueError(f"Weights can be quantised to 8 or 4 bits, got {bits!r}.")


def quantize_weight(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight, symmetrically and row by row.

    Args:
        weight: float [N, K], any dtype and device. Row maximum and scale are taken in this dtype, as in the release.
        bits: 8 or 4.

    Returns:
        int8 [N, K] (packed [N, K/2] for INT4), and the scales, float32 [N]. A row of zeros has scale 0.

    Raises:
        ValueError: other bits, a weight that is not a float matrix or not finite, an odd K with INT4.
    """
    check_bits(bits)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"Expected a float matrix [N, K] to quantise, got {weight.dtype} {list(weight.shape)}.")
    if bits == 4 and weight.shape[1] % 2:
        raise ValueError(f"INT4 packs two columns in a byte, so K must be even; got K = {weight.shape[1]}.")
    largest = 2 ** (bits - 1) - 1
    quantized = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for rows in _slices(weight):
        part = weight[rows]
        row_max = part.abs().amax(dim=1)
        # A tensor divides exactly; by a Python number a GPU multiplies with its rounded reciprocal.
        row_scale = (row_max / torch.full_like(row_max, largest)).float()
        if not row_scale.isfinite().all():
            raise ValueError("A weight holds NaN or infinite numbers, so it can't be quantised: check its file.")
        # A row whose scale underflowed to zero has only zeros to store, whatever it is divided by.
        divisor = torch.where(row_scale == 0, torch.inf, row_scale)[:, None]
        quantized[rows] = (part.float() / divisor).round().clamp(-largest - 1, largest).to(torch.int8)
        scale[rows] = row_scale
    return (pack_int4(quantized) if bits == 4 else quantized), scale


def pack_int4(quantized: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] holding -8…7, K even → int8 [N, K/2], the even column in the high nibble."""
    return (quantized[:, 0::2] << 4) | (quantized[:, 1::2] & 0x0F)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_int4`: int8 [N, K/2] → int8 [N, K]."""
    high, low = packed >> 4, (packed << 4) >> 4  # shifts of signed bytes carry the sign
    return torch.stack((high, low), dim=-1).flatten(-2)


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The float weight `q · scale` of stored int8 [N, K] (INT4: [N, K/2]) and scales [N], as `dtype` [N, K]."""
    check_bits(bits)
    weight = unguarded(weight)
    integers = unpack_int4(weight) if bits == 4 else weight
    return integers.to(dtype).mul_(scale.to(dtype)[:, None])


def _slices(weight: torch.Tensor) -> Iterator[slice]:
    numel = _SLICE_NUMEL if weight.device.type == "cpu" else 32 * _SLICE_NUMEL
    rows, columns = weight.shape
    step = max(1, numel // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    # Half products are slow on a CPU and less exact everywhere; float32 is neither there.
    return torch.float32 if x.device.type == "cpu" and x.dtype != torch.float64 else x.dtype


def _plain_linear(x, weight, scale, bias, bits):
    dtype = _compute_dtype(x)
    rows = x.to(dtype)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    for part in _slices(weight):
        y[:, part] = rows @ dequantize_weight(weight[part], scale[part], bits, dtype).T
    return y if bias is None else y.add_(bias.to(x.dtype))


def _plain_input_gradient(grad_y, weight, scale, bits):
    dtype = _compute_dtype(grad_y)
    grad_x = torch.zeros(grad_y.shape[0], weight.shape[1] * 8 // bits, dtype=dtype, device=grad_y.device)
    for part in _slices(weight):
        grad_x += grad_y[:, part].to(dtype) @ dequantize_weight(weight[part], scale[part], bits, dtype)
    return grad_x.to(grad_y.dtype)


def _linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """x [..., K] → x · (q · scale)ᵀ + bias [..., N], by a kernel where there is one; no float weight outlives it."""
    if cuda_available(x.device, x.dtype):
        return cuda_product(x, weight, scale, bias, bits)
    rows = x.reshape(-1, x.shape[-1])
    is_double = torch.float64 in (x.dtype, scale.dtype)
    if x.device.type == "cpu" and not is_double and weight.is_contiguous() and cpu_library():
        y = cpu_library().linear(rows, weight, scale, bias, bits)
    else:
        y = _plain_linear(rows, weight, scale, bias, bits)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _input_gradient(grad_y: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The gradient [..., K] of the input, for that of the output [..., N]."""
    if cuda_available(grad_y.device, grad_y.dtype):
        return cuda_input_gradient(grad_y, weight, scale, bits)
    grad_x = _plain_input_gradient(grad_y.reshape(-1, grad_y.shape[-1]), weight, scale, bits)
    return grad_x.view(*grad_y.shape[:-1], grad_x.shape[-1])


def _exported_linear(x, weight, scale, bias, bits):
    """x [M, K] → [M, N] by operators that every runtime of exported programs has; the weight stays int8 in the file."""
    if bits == 4:
        # The runtimes shift no signed bytes.
        packed = weight.to(x.dtype)
        high = (packed / 16).floor()
        low = packed - 16 * high
        wide = torch.stack((high, torch.where(low < 8, low, low - 16)), dim=-1).flatten(-2)
    else:
        wide = weight.to(x.dtype)
    return nn.functional.linear(x, wide * scale.to(x.dtype)[:, None], None if bias is None else bias.to(x.dtype))


def _is_exported() -> bool:
    """Whether torch.export or torch.onnx.export traces, whose programs run without this module."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


@torch.library.custom_op("chatglm_int8::quantized_linear", mutates_args=())
def _quantized_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bits: int
) -> torch.Tensor:
    return _linear(x, weight, scale, bias, bits)


@_quantized_linear.register_fake
def _(x, weight, scale, bias, bits):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("chatglm_int8::quantized_linear_input_gradient", mutates_args=())
def _quantized_linear_input_gradient(
    grad_y: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int
) -> torch.Tensor:
    return _input_gradient(grad_y, weight, scale, bits)


@_quantized_linear_input_gradient.register_fake
def _(grad_y, weight, scale, bits):
    return grad_y.new_empty(grad_y.shape[0], weight.shape[1] * 8 // bits)


def _keep_for_gradient(ctx, inputs, output):
    # Not by save_for_backward: checkpointing computes a block again up to the last tensor saved so, and this product,
    # the last of its block, need not be among that.
    _, ctx.weight, ctx.scale, _, ctx.bits = inputs


def _gradient(ctx, grad_y):
    """The gradient goes to x alone, and no float weight outlives a call."""
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = _quantized_linear_input_gradient(grad_y.contiguous(), ctx.weight, ctx.scale, ctx.bits)
    return grad_x, None, None, None, None


_quantized_linear.register_autograd(_gradient, setup_context=_keep_for_gradient)


def check_first_derivative(grad: torch.Tensor) -> None:
    """Raise on double backward: the CUDA kernels have no second derivative."""
    if torch.is_grad_enabled() and cuda_available(grad.device, grad.dtype):
        raise RuntimeError(
            "The CUDA kernels have no second derivatives: leave out create_graph=True, or set CHATGLM_CUDA_KERNEL=0 in "
            "the environment, with which PyTorch computes them."
        )


class _Product(torch.autograd.Function):
    """What the operator does, for eager training: calling an operator takes several times as long as the launches."""

    @staticmethod
    def forward(ctx, x, weights):
        ctx.weights = weights  # kept as the operator does
        return _linear(x, *weights)

    @staticmethod
    def backward(ctx, grad_y):
        check_first_derivative(grad_y)
        weight, scale, _, bits = ctx.weights
        return _input_gradient(grad_y.contiguous(), weight, scale, bits), None


def is_traced() -> bool:
    """True under torch.compile, jit tracing or a dispatch mode, which cannot see the kernels' launches."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that `torch.autocast` has linears compute in now; None where it is off."""
    has_autocast = device_type in ("cpu", "cuda", "mps", "xpu")  # asking torch would break a compiled graph
    if has_autocast and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """What torch's own linear would make of its input: autocast's dtype, but float64 stays."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


# Words in the names of arithmetic functions, which mean nothing with integers that lack their scales.
_ARITHMETIC = {"abs", "neg", "pow", "norm", "mean", "sum", "cumsum", "linear", "embedding", "einsum", "dot", "lerp"}
_ARITHMETIC |= {"matmul", "mm", "mv", "bmm", "addmm", "addmv", "baddbmm", "addcmul", "addcdiv", "inner", "outer"}
_ARITHMETIC |= {"subtract", "multiply", "divide", "svd", "qr", "inv", "pinv", "eigh"}
_ARITHMETIC |= {
    prefix + name for prefix in ("", "i", "r") for name in ("add", "sub", "mul", "div", "truediv", "floordiv")
}

_DTYPE = torch.Tensor.dtype.__get__


class StoredIntegers(torch.Tensor):
    """What reading `QuantizedLinear.weight` gives: the parameter, but arithmetic with it is refused.

    Without their scales the integers are no weight. Code that takes them for one, such as PEFT's DoRA and all merging,
    would go on with wrong numbers. Shape, dtype, device, copies, slices, comparisons and operations on bits are those
    of the parameter, and what is written here is written there.
    """

    _is_param = True  # for isinstance(…, nn.Parameter)

    def __new__(cls, integers: torch.Tensor, requires_grad: bool = False) -> nn.Parameter:
        """The parameter again: accelerate makes new ones of the class of what it has read."""
        return nn.Parameter(unguarded(integers), requires_grad=requires_grad)

    @staticmethod
    def of(integers: torch.Tensor) -> "StoredIntegers":
        """The same tensor, guarded."""
        guarded = torch.Tensor._make_subclass(StoredIntegers, integers.detach())
        guarded.__dict__["stored"] = integers
        return guarded

    def __getattr__(self, name: str):
        return getattr(self.__dict__["stored"], name)

    def __setattr__(self, name: str, value) -> None:
        if name == "data":
            _check_is_integer("data", value)
        setattr(self.__dict__["stored"], name, value)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = func.__name__
        if func == _DTYPE and sys._getframe(1).f_globals.get("__name__", "").startswith("peft.tuners.unilora"):
            _refuse("UniLoRA, whose scales have the dtype of the weight and would all be 0,")
        given = tree_map(unguarded, (args, kwargs or {}))
        if not _ARITHMETIC.isdisjoint(name.split("_")):
            _refuse(name)
        own = str(func).startswith("chatglm_int8.")
        for value in () if own else tree_leaves(given):
            _check_is_integer(name, value)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*given[0], **given[1])
        if own or name.endswith("_like") or name.startswith("new_"):
            return result
        tree_map(lambda value: _check_is_integer(name, value), result)
        return tree_map(lambda value: StoredIntegers.of(value) if _is_stored(value) else value, result)


def _is_stored(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.int8 and value.ndim > 0


def unguarded(value):
    """The tensor of `StoredIntegers`; anything else as it is."""
    return value.__dict__["stored"] if isinstance(value, StoredIntegers) else value


def _check_is_integer(name: str, value) -> None:
    is_tensor = isinstance(value, torch.Tensor)
    if isinstance(value, float) or (is_tensor and (value.is_floating_point() or value.is_complex())):
        _refuse(name)


def _refuse(name: str) -> None:
    raise RuntimeError(  # a TypeError would get lost in Python's operators
        f"{name} was called with the weight of a QuantizedLinear, integers without their scales. For its float weight "
        "call dequantize(). To read, change or merge weights, dequantise the model first (`chatglm merge dequantize`); "
        "LoRA is merged by `chatglm merge lora`."
    )


class QuantizedLinear(nn.Linear):
    """A linear layer with int8 or packed int4 weights; a subclass of `nn.Linear` so that PEFT finds it.

    Attributes:
        weight: int8 [N, K], INT4 [N, K/2]; never trained, and left alone by `.half()`, `.float()`, `dtype=`. Arithmetic
            with it raises a RuntimeError (see `StoredIntegers`); `dequantize` gives the float weight.
        weight_scale: float [N]; follows the model's dtype.
        bias: float [N] or None.
        bits: 8 or 4.

    The input is [..., K] and the output [..., N], both of the activation's dtype, or of autocast's. Gradients reach the
    input, and a bias that requires them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_bits(bits)
        if bits == 4 and in_features % 2:
            raise ValueError(f"INT4 packs two columns in a byte, so in_features must be even; got {in_features}.")
        nn.Module.__init__(self)  # not nn.Linear's, which would make a float weight first
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        columns = in_features * bits // 8

        def parameter(*shape: int, dtype: torch.dtype | None) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device), requires_grad=False)

        self.weight = parameter(out_features, columns, dtype=torch.int8)
        self.weight_scale = parameter(out_features, dtype=dtype)
        self.bias = parameter(out_features, dtype=dtype) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int) -> "QuantizedLinear":
        """Quantise a float `nn.Linear` into a new layer of the same device, dtype and mode (training or not)."""
        dtype, device = linear.weight.dtype, linear.weight.device
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, bits, device=torch.device("meta"))
        weight, scale = quantize_weight(linear.weight.detach(), bits)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.weight_scale = nn.Parameter(scale.to(device, dtype), requires_grad=False)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"Expected an activation [..., {self.in_features}], got {list(x.shape)}.")
        x = _autocast(x)
        weight, scale, bias, bits = self.weights()
        if not self.trains_bias():
            return self._multiply(x, weight, scale, bias, bits)
        return self._multiply(x, weight, scale, None, bits) + bias.to(x.dtype)

    def trains_bias(self) -> bool:
        """Whether autograd wants a gradient of the bias."""
        bias = self.weights()[2]
        return bias is not None and bias.requires_grad and torch.is_grad_enabled()

    def _multiply(self, x: torch.Tensor, *weights) -> torch.Tensor:
        if is_traced():
            rows = x.reshape(-1, self.in_features)
            linear = _exported_linear if _is_exported() else torch.ops.chatglm_int8.quantized_linear
            return linear(rows, *weights).view(*x.shape[:-1], self.out_features)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return _linear(x, *weights)
        if cuda_available(x.device, x.dtype):
            return _Product.apply(x, weights)
        # Others make rows, whose view must not come out of an autograd function: it could not be changed in place.
        return _Product.apply(x.reshape(-1, self.in_features), weights).view(*x.shape[:-1], self.out_features)

    def __getattr__(self, name: str):
        value = super().__getattr__(name)
        return StoredIntegers.of(value) if name == "weight" and type(value) is nn.Parameter else value

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As every module's; a float weight is refused."""
        if name == "weight":
            if isinstance(param, StoredIntegers):
                param = nn.Parameter(unguarded(param).data, requires_grad=False)
            _check_is_integer("QuantizedLinear.weight = …", param)
        super().register_parameter(name, param)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int]:
        """Weight, scale, bias and bits."""
        parameters = self._parameters
        try:  # an attribute is looked for in other places first, which takes as long as half a launch
            return parameters["weight"], parameters["weight_scale"], parameters["bias"], self.bits
        except KeyError:  # FSDP puts views in their place
            return unguarded(self.weight), self.weight_scale, self.bias, self.bits

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The float weight [N, K], of the scales' dtype unless `dtype` says otherwise."""
        weight, scale, _, bits = self.weights()
        return dequantize_weight(weight, scale, bits, dtype or scale.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


# What the published `quantize` took beside its bits.
_PUBLISHED_QUANTIZE = {"kernel_file", "use_quantization_cache", "compile_parallel_kernel", "parallel_num", "empty_init"}


def check_quantizable(model: nn.Module, bits: int, quantize_embeddings: bool, published: dict) -> None:
    """Raise what `ChatGLMForConditionalGeneration.quantize` says; arguments as of it."""
    check_bits(bits)
    unknown = published.keys() - _PUBLISHED_QUANTIZE
    if unknown:
        raise TypeError(f"quantize got unexpected arguments: {', '.join(sorted(unknown))}.")
    if quantize_embeddings:
        raise ValueError("quantize_embeddings must be False: embedding and LM head stay in floating point.")
    if any(hasattr(module, "base_layer") for module in model.transformer.layers.modules()):
        raise ValueError(
            "The model has PEFT's adapters in its blocks, which would be quantised with them: call quantize before "
            "get_peft_model, or after merge_and_unload."
        )
    if model.config.quantization_bit not in (0, bits):
        raise ValueError(
            f"The model is quantised to {model.config.quantization_bit} bits already and can't go to {bits}: "
            "load the float weights and quantise those."
        )
    if any(parameter.is_meta for parameter in model.transformer.layers.parameters()):
        raise ValueError("Weights of the model are offloaded: quantise it first, then save and offload it.")


def quantize_linears(module: nn.Module, bits: int) -> None:
    """Replace every `nn.Linear` below `module` by a `QuantizedLinear`, one at a time, freeing each float weight.

    Raises:
        ValueError: a weight that can't be quantised, by name; the linears before it are replaced by then.
    """
    names = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and not isinstance(child, QuantizedLinear)
    ]
    for name in names:
        try:
            module.set_submodule(name, QuantizedLinear.from_linear(module.get_submodule(name), bits))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


# Of a half weight: what gives another half weight, and what computes with it. PEFT puts trained rows in by index_copy.
_KEPT = {"T", "mT", "t", "transpose", "permute", "index_copy"}
_PRODUCTS = {"linear", "matmul", "mm", "mv", "bmm", "addmm", "addmv", "einsum", "tensordot", "inner", "index_copy"}


class _Half(torch.Tensor):
    """A half weight that PyTorch's products take as float32 beside float32, where they would refuse half."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, given = getattr(func, "__name__", ""), (args, kwargs or {})
        name = func.__self__.__name__ if name == "__get__" else name.strip("_").removeprefix("r")
        with torch._C.DisableTorchFunctionSubclass():
            if name in _PRODUCTS and any(_is_float(value) for value in tree_leaves(given)):
                given = tree_map(lambda value: value.float() if isinstance(value, _Half) else value, given)
            result = func(*given[0], **given[1])
            is_half = name in _KEPT and result.dtype in (torch.float16, torch.bfloat16)
            return result.as_subclass(_Half) if is_half else result


class _HalfParameter(_Half, nn.Parameter):
    """The parameter of such a weight."""


def _is_float(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


class _StaysHalf(nn.Module):
    """A layer whose half weight stays half in memory when a model on the CPU is made float32, and becomes float32 when
    that model leaves the CPU.

    Attributes:
        stays_half: whether it does; the release's embedding and LM head do, which are a gigabyte.
    """

    stays_half = False
    _should_be_float = False

    def halve(self, layers: list["_StaysHalf"]) -> None:
        """If this layer stays half, make a float32 weight on the CPU half, unless that would change it.

        `layers`: all such layers of the model; others may have the same weight.
        """
        weight = self.weight
        if self.stays_half and weight.dtype == torch.float32 and weight.device.type == "cpu":
            half = torch.empty_like(weight, dtype=torch.float16)
            for part in _slices(weight):
                half[part] = weight.detach()[part]
                if not torch.equal(half[part].float(), weight.detach()[part]):
                    return
            weight.data = half
            for layer in layers:
                layer._should_be_float |= layer.weight is weight
            self._mark()

    def _mark(self) -> None:
        """Make the weight a `_HalfParameter` as long as it stays half beside float32 on the CPU."""
        weight = self.weight
        if type(weight) in (nn.Parameter, _HalfParameter):
            is_half = weight.device.type == "cpu" and weight.dtype in (torch.float16, torch.bfloat16)
            weight.__class__ = _HalfParameter if self._should_be_float and is_half else nn.Parameter

    def train(self, mode: bool = True):
        """As every module's; but a weight that is to be trained beside float32 becomes float32, as an optimizer's steps
        would be lost in half."""
        if mode and self._should_be_float and self.weight.requires_grad:
            self.weight.data = self.weight.data.float()
            self._mark()
        return super().train(mode)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """As every module's; but beside float32, a weight that half would round, as a trained one, is kept float32."""
        weight, given = self.weight, state_dict.get(f"{prefix}weight")
        is_wider = given is not None and given.dtype == torch.float32 != weight.dtype
        if self._should_be_float and is_wider and not torch.equal(given.to(weight.dtype).float(), given):
            weight.data = weight.data.float()
            self._mark()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn, recurse=True):
        if not self.stays_half:
            return super()._apply(fn, recurse)

        def keep_half(tensor: torch.Tensor) -> torch.Tensor:
            becomes = fn(tensor.new_empty(0))
            if tensor.dtype not in (torch.float16, torch.bfloat16) or becomes.device.type == "meta":
                return fn(tensor)
            if becomes.dtype != tensor.dtype:
                self._should_be_float = becomes.dtype == torch.float32
            if becomes.device.type != "cpu":
                return fn(tensor).float() if self._should_be_float else fn(tensor)
            stays = self._should_be_float and becomes.dtype != tensor.dtype
            return tensor.to("cpu") if stays and tensor.device.type != "meta" else fn(tensor)

        super()._apply(keep_half, recurse)
        self._mark()
        return self


class HalfEmbedding(_StaysHalf, nn.Embedding):
    """An embedding whose weight can stay half; its output is of the weight's dtype."""


class _HalfProduct(torch.autograd.Function):
    """rows [M, K] · weightᵀ, half [N, K], on the CPU: [M, N] of the rows' dtype, summed in float32.

    No more of the weight than a slice is made float32, neither here nor for the gradients.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows if weight.requires_grad else None, weight)
        if rows.shape[0] <= MAX_HALF_ROWS and weight.is_contiguous() and cpu_library():
            return cpu_library().half_linear(rows, weight)
        y = torch.empty(rows.shape[0], weight.shape[0], dtype=rows.dtype, device=rows.device)
        rows = rows.float()
        for part in _slices(weight):
            y[:, part] = rows @ weight[part].float().T
        return y

    @staticmethod
    def backward(ctx, grad_y: torch.Tensor):
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight = ctx.needs_input_grad
        shape = grad_y.shape[0], weight.shape[1]
        grad_rows = torch.zeros(shape, dtype=torch.float32, device=grad_y.device) if needs_rows else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        for part in _slices(weight):
            grad = grad_y[:, part].float()
            if needs_rows:
                grad_rows += grad @ weight[part].float()
            if needs_weight:
                grad_weight[part] = (grad.T @ rows.float()).to(weight.dtype)
        return grad_rows.to(grad_y.dtype) if needs_rows else None, grad_weight


class HalfLinear(_StaysHalf, nn.Linear):
    """A linear layer without bias whose weight can stay half beside activations of another dtype.

    The input is [..., K] and the output [..., N], of the input's dtype, summed in float32 where the weight is half and
    on the CPU.
    """

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None):
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        x = _autocast(x)
        on_cpu = x.device.type == "cpu" and weight.dtype in (torch.float16, torch.bfloat16) and x.dtype != torch.float64
        if not on_cpu or is_traced():
            return nn.functional.linear(x, weight.to(x.dtype))
        y = _HalfProduct.apply(x.reshape(-1, self.in_features), weight)
        return y.view(*x.shape[:-1], self.out_features)
