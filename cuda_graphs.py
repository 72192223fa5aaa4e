"""Keys and values of earlier tokens, and decoding on an NVIDIA GPU: a step of one token as a CUDA graph.

Launching the few hundred kernels of a step from Python takes ten times as long as running them, so they are recorded
once and replayed. What is recorded is the model's own modules, run on the kernels of `kernels_cuda`; the addresses that
they use stay the same from step to step: the token, its position and its place in the cache are tensors that the graph
reads, and that it moves on by itself.

Letters as in `modeling_chatglm`.
"""

import copy
import threading
import weakref

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_chatglm import ChatGLMConfig
from .cuda_plans import HEAD_DIMS, parts_of_keys
from .cuda_runtime import new_arrivals, own_arrivals
from .kernels_cuda import attend, available, begin_step, end_step, split_rotate
from .quantization import is_traced
from .sequences import rotary_frequencies

# transformers calls a model's cache `cache` since 5.24, in arguments and in outputs, and called it `past_key_values`
# before. The models here take either name; what is handed to transformers or returned has the one that it knows.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, given under either of its names."""
    if past_key_values is not None and cache is not None:
        raise ValueError(
            "past_key_values and cache are two names of the same argument: pass one of them. If PEFT's prefix tuning "
            "passes both: use this model's own P-Tuning v2 instead (config.pre_seq_len, model.load_prefix)."
        )
    return past_key_values if cache is None else cache


# Columns that are added to a cache at a time.
_GROWTH = 512
# A model's last cache is kept for its next answer, with its graph, if it is not larger than this or than this share of
# the device's memory.
_KEPT_BYTES, _KEPT_SHARE = 1 << 30, 1 / 8


class GrowingLayer(DynamicLayer):
    """Keys and values of a block in buffers with room for more, so that a step writes one column and copies nothing.

    Attributes:
        buffers: keys and values, [B, H, room for T, D] each; None while there are none.
        length: T, how many columns are filled.
        keys, values: [B, H, T, D], views of the buffers. transformers replaces both to reorder or to crop a cache.
    """

    def __init__(self):
        self.adopt(None)
        self._new_keys: torch.Tensor | None = None  # set before the values that belong to them
        super().__init__()

    def adopt(self, buffers: tuple[torch.Tensor, torch.Tensor] | None, length: int = 0) -> None:
        """Use these buffers, whose first `length` columns are filled."""
        self.buffers, self.length = buffers, length
        self._written = [length]  # columns of the buffers that are in use; a list, for copies of this layer to share

    @property
    def keys(self) -> torch.Tensor | None:
        return None if self.buffers is None else self.buffers[0][:, :, : self.length]

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._new_keys = value

    @property
    def values(self) -> torch.Tensor | None:
        return None if self.buffers is None else self.buffers[1][:, :, : self.length]

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        if value is None or self._new_keys is None:
            self.adopt(None)
        else:
            self.adopt((self._new_keys, value), value.shape[2])  # no room: the next update makes buffers of its own
        self._new_keys = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Called before the first keys are stored."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def has_room(self, batch: int, columns: int) -> bool:
        """Whether columns behind `length`, up to so many, can be written.

        Not if a copy of this layer has written there: it shares the buffers.
        """
        if self.buffers is None or self._written[0] != self.length:
            return False
        return self.buffers[0].shape[0] == batch and self.buffers[0].shape[2] >= columns

    def reserve(self, columns: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make room for so many columns of the batch, heads, width and dtype of these, [B, H, any, D] each."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        if self.has_room(len(keys), columns):
            return
        columns = -(-columns // _GROWTH) * _GROWTH
        old, length = self.buffers, self.length
        self.adopt(tuple(like.new_empty(*like.shape[:2], columns, like.shape[3]) for like in (keys, values)), length)
        if length:
            for new, buffer in zip(self.buffers, old, strict=True):
                new[:, :, :length] = buffer[:, :, :length]

    def fill(self, length: int) -> None:
        """Count the columns up to `length` as filled: they have been written."""
        self.length = self._written[0] = length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append [B, H, S, D] to each; returns all keys and values, [B, H, T + S, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.length
        if key_states.requires_grad or is_traced():  # what autograd or a graph has seen is not overwritten
            self.keys = torch.cat((self.keys, key_states), dim=2) if start else key_states
            self.values = torch.cat((self.values, value_states), dim=2) if start else value_states
            return self.keys, self.values
        if start and self.buffers[0].is_inference() and not torch.is_inference_mode_enabled():
            self.adopt((self.keys, self.values), start)  # which PyTorch lets nothing be written to
        end = start + key_states.shape[2]
        self.reserve(end, key_states, value_states)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.fill(end)
        return self.keys, self.values

    def get_seq_length(self, *args) -> int:
        return self.length


def new_cache(config: ChatGLMConfig, device: torch.device) -> DynamicCache:
    """An empty cache for a model on that device. On a CPU a step on it copies nothing."""
    cache = DynamicCache(config=config)
    if device.type == "cpu":
        cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache


# Of each model, what the last answer has left: at most one graph with its buffers.
_idle: "weakref.WeakKeyDictionary[nn.Module, StepGraph]" = weakref.WeakKeyDictionary()
_idle_lock = threading.RLock()  # the garbage collector may drop a cache inside
# PyTorch's random numbers can't be drawn in one thread while another records.
_recording_lock = threading.RLock()


def forget_steps(model: nn.Module) -> None:
    """Give back the memory that is kept for a model's next answer."""
    with _idle_lock:
        _idle.pop(model, None)


def draw(probs: torch.Tensor) -> torch.Tensor:
    """Indices [B] drawn from probabilities [B, V]."""
    with _recording_lock:
        return torch.multinomial(probs, num_samples=1).squeeze(1)


def _addresses(model: nn.Module) -> tuple | None:
    """What a recorded step depends on; None if that can't be told, since foreign modules take part."""
    found = []
    for module in model.modules():
        origin = type(module).__module__
        if not (origin.startswith("torch.nn.") or origin.rpartition(".")[0] == __name__.rpartition(".")[0]):
            return None
        if module._forward_hooks or module._forward_pre_hooks or module.__dict__.get("forward") is not None:
            return None
        found.append(id(module))
        for tensor in module._parameters.values():
            if tensor is not None:
                found.append(tensor.data_ptr())
    return tuple(found)


class StepGraph:
    """A step of one token for each of B sequences, recorded as a CUDA graph over buffers of keys and values.

    Args:
        model: a `ChatGLMForConditionalGeneration` for which `can_record` is true.
        batch: B.

    Attributes:
        ids: int64 [B], the tokens to read.
        positions, advance: int64 [B, R]: the tokens' positions, and how they change from token to token.
        slots: int32 [B]: the tokens' places in the buffers. Places before them are filled.
        padding: int32 [B]: so many of those places, after the prefix, are masked.
        buffers: for each block, keys and values, [B, H, T, D] each; None before the first recording.
        logits: scores [B, 1, V], until the next step.

    All of them are read when a step is replayed, and the step moves positions and slots on by itself.
    """

    def __init__(self, model: nn.Module, batch: int):
        config, device = model.config, model.transformer.word_embeddings.weight.device
        rows = config.position_rows
        self._head_dim = config.head_dim
        self._prefix = config.pre_seq_len or 0
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch, rows, dtype=torch.int64, device=device)
        self.advance = torch.zeros(batch, rows, dtype=torch.int64, device=device)
        self.slots = torch.zeros(batch, dtype=torch.int32, device=device)
        self.padding = torch.zeros(batch, dtype=torch.int32, device=device)
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.logits: torch.Tensor | None = None
        self.stream: torch.cuda.Stream | None = None  # where it was replayed last
        self._arrivals = new_arrivals(device)
        self._frequencies = rotary_frequencies(self._head_dim // rows, device).float()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._weights: tuple | None = None  # whose addresses the graph has

    @property
    def is_reusable(self) -> bool:
        """Whether there is a recording, of modules that are all known."""
        return self._graph is not None and self._weights is not None

    def fits(self, model: nn.Module) -> bool:
        """Whether it is, and was made with the modules and weights that the model has now."""
        return self.is_reusable and self._weights == _addresses(model)

    def forget(self) -> None:
        """Drop the recording and its memory; the next `replay` records anew."""
        self._graph = self.logits = None

    def replay(self, model: nn.Module) -> torch.Tensor:
        """Make a step, which stores the tokens' keys and values, and return `logits`."""
        self.stream = torch.cuda.current_stream(self.ids.device)
        if self._graph is None:
            self._record(model)
        self._graph.replay()
        return self.logits

    def attend(self, layer_idx: int, qkv: torch.Tensor, cosines, sines) -> torch.Tensor:
        """Attention of the step, for qkv [B, 1, H·3·D]: [B, 1, H·D]."""
        keys, values = self.buffers[layer_idx]
        parts = parts_of_keys(keys.shape[0] * keys.shape[1], keys.get_device())
        given = (self.slots, self.padding, self._prefix, self.positions.shape[1], parts)
        return attend(qkv[:, 0].contiguous(), cosines, sines, keys, values, *given)[:, None]

    def begin(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings [B, 1, hidden] of the ids, and cosines and sines of their positions, for `attend`."""
        hidden, cosines, sines = begin_step(self.ids, embedding, self.positions, self._frequencies, self._head_dim)
        return hidden[:, None], cosines, sines

    def end(self, hidden: torch.Tensor) -> None:
        """Move positions and slots on to the next token; `hidden` is a tensor of the step."""
        end_step(hidden, self.positions, self.advance, self.slots, self._head_dim)

    def _record(self, model: nn.Module) -> None:
        device = self.ids.device
        positions, slots = self.positions.clone(), self.slots.clone()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream), own_arrivals(self._arrivals):
            model.run_step(self)  # what libraries set up at their first call is not for a graph
            self.positions.copy_(positions)
            self.slots.copy_(slots)
            recorded = torch.cuda.CUDAGraph()
            with _recording_lock:
                recorded.capture_begin(capture_error_mode="thread_local")
                try:
                    self.logits = model.run_step(self)
                finally:
                    recorded.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph, self._weights = recorded, _addresses(model)


class StepCache(Cache):
    """The cache of a generation in which steps of one token are replayed from a graph.

    To everybody else it is a cache like transformers' DynamicCache. Each has buffers and a graph of its own, so that
    generations in several threads don't meet; when it is dropped, a later generation of the same model may take over.

    Args:
        model: a `ChatGLMForConditionalGeneration` for which `can_record` is true.
        padding: int32 [B]: the tokens of padding on the left of each sequence.
    """

    def __init__(self, model: nn.Module, padding: torch.Tensor):
        config = model.config
        super().__init__(layers=[GrowingLayer() for _ in range(config.num_layers)])
        self._model = weakref.ref(model)
        self._head_dim = config.head_dim
        self._placed = -1  # the length of the cache at which the graph's positions are right
        self._slot = -1  # what the graph's slots are
        with _idle_lock:
            graph = _idle.pop(model, None)
        if graph is not None:
            keys = graph.buffers[0][0]
            if (keys.shape[0], keys.device, keys.dtype) != (len(padding), padding.device, model.dtype):
                graph = None
        if graph is not None:
            stream = torch.cuda.current_stream(padding.device)
            stream.wait_stream(graph.stream)  # a last step may still be running
            for layer, buffers in zip(self.layers, graph.buffers, strict=True):
                layer.adopt(buffers)
                if stream != graph.stream:
                    for buffer in buffers:
                        buffer.record_stream(stream)
        memory = torch.cuda.get_device_properties(padding.device).total_memory if padding.is_cuda else 0
        self._most_kept = max(_KEPT_BYTES, _KEPT_SHARE * memory)
        self._graph = graph or StepGraph(model, len(padding))
        self._graph.padding.copy_(padding)
        self._checked = False

    def __del__(self):
        graph, model = getattr(self, "_graph", None), self._model()
        if graph is None or model is None or model.training or not graph.is_reusable:
            return
        size = sum(2 * keys.numel() * keys.element_size() for keys, _ in graph.buffers)
        if size <= self._most_kept and all(a.buffers is b for a, b in zip(self.layers, graph.buffers, strict=True)):
            with _idle_lock:
                _idle[model] = graph

    def __deepcopy__(self, memo: dict) -> "StepCache":
        """A cache with buffers of its own, and no recording."""
        copied = StepCache(self._model(), self._graph.padding)
        copied.layers = copy.deepcopy(self.layers, memo)
        return copied

    def knows_position(self) -> bool:
        """Whether the next token's position is in the graph's tensors already."""
        return self._placed == self.layers[0].length

    def set_positions(self, positions: torch.Tensor, advance: torch.Tensor) -> None:
        """The next token's positions, int64 [B, R], and how they change from token to token."""
        self._graph.positions.copy_(positions)
        self._graph.advance.copy_(advance)
        self._placed = self.layers[0].length

    def store_prompt(
        self, layer_idx: int, qkv: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Rotate qkv [B, S, H, 3·D] and store its keys and values, by one kernel.

        Returns:
            the queries [B, H, S, D], and keys and values so far; None where that kernel can't: with gradients, or
            unless all are of one half precision (autocast may give the product another).
        """
        same = qkv.dtype == cosines.dtype == sines.dtype
        if not same or qkv.dtype not in (torch.float16, torch.bfloat16) or torch.is_grad_enabled():
            return None
        layer = self.layers[layer_idx]
        end = layer.length + qkv.shape[1]
        like = qkv[..., : self._head_dim].transpose(1, 2)
        layer.reserve(end + 1, like, like)  # and for a first step
        queries = split_rotate(qkv, cosines, sines, *layer.buffers, layer.length)
        layer.fill(end)
        return queries, layer.keys, layer.values

    @torch.no_grad()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Scores [B, 1, V] of the token that follows ids [B, 1], whose keys and values are stored."""
        model, graph, length = self._model(), self._graph, self.layers[0].length
        self._make_ready(model)
        if self._slot != length:
            graph.slots.fill_(length)
        graph.ids.copy_(input_ids[:, 0])
        logits = graph.replay(model)
        for layer in self.layers:
            layer.fill(length + 1)
        self._slot = length + 1
        self._placed += 1
        return logits.clone()

    def _make_ready(self, model: nn.Module) -> None:
        """Drop a graph that was recorded over other buffers or weights, and make room for one more token."""
        graph = self._graph
        first = self.layers[0]
        full = not first.has_room(len(graph.ids), first.length + 1)
        if self._checked and not full and graph.buffers is not None and graph.buffers[0] is first.buffers:
            return
        if not self._checked:
            if not graph.fits(model):
                graph.forget()
            self._checked = True
        if (
            full
            or graph.buffers is None
            or any(a.buffers is not b for a, b in zip(self.layers, graph.buffers, strict=True))
        ):
            graph.forget()
            graph.buffers = None  # its memory is free for the new one
            for layer in self.layers:
                layer.reserve(layer.length + 1, *layer.buffers)
            graph.buffers = [layer.buffers for layer in self.layers]


def can_record(model: nn.Module) -> bool:
    """Whether steps of this model can be recorded: one GPU, half precision, evaluation, no hooks, the kernels load."""
    weight = model.transformer.word_embeddings.weight
    config = model.config
    if weight.device.type != "cuda" or model.training or torch.compiler.is_compiling():
        return False
    if config.head_dim not in HEAD_DIMS or config.hidden_size % 8 or config.hidden_size > 16384:
        return False
    if any(parameter.device != weight.device for parameter in model.parameters()):
        return False
    if nn.modules.module._has_any_global_hook():
        return False
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return False
    floats = {parameter.dtype for parameter in model.transformer.layers.parameters() if parameter.is_floating_point()}
    if weight.dtype not in floats or type(model.transformer.word_embeddings).forward is not nn.Embedding.forward:
        return False
    return available(weight.device, weight.dtype)
