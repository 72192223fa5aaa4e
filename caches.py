"""Keys and values of earlier tokens.

Letters as in `modeling_chatglm`.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .quantization import is_traced

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


class _Buffer:
    """Memory [B, H, room for T, D] that grows to the right; `filled` of its columns belong to some view."""

    def __init__(self, memory: torch.Tensor):
        self.memory = memory
        self.filled = 0

    def takes(self, states: torch.Tensor, end: int) -> bool:
        """Whether columns up to `end` can be written behind `states`.

        Not if those are other tensors (beam search and users put some in the place of views), or if a fork of the cache
        or keys from before a crop have columns there.
        """
        if self.memory.is_inference() and not torch.is_inference_mode_enabled():
            return False
        is_view = (states.data_ptr(), states.stride()) == (self.memory.data_ptr(), self.memory.stride())
        fits = end <= self.memory.shape[-2] and states.shape[0] == self.memory.shape[0]
        return is_view and fits and states.shape[-2] == self.filled


class GrowingLayer(DynamicLayer):
    """Keys and values of a block in buffers with room for more, so that a step writes one column and copies nothing.

    Attributes:
        keys, values: [B, H, T, D], views of the buffers.
    """

    _room = 256  # columns

    def lazy_initialization(self, *args) -> None:
        """Called before the first keys are stored."""
        super().lazy_initialization(*args)
        self._key_buffer = self._value_buffer = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append [B, H, S, D] to each; returns all keys and values, [B, H, T + S, D]."""
        if key_states.requires_grad or is_traced():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._key_buffer, self.keys = self._append(self._key_buffer, self.keys, key_states)
        self._value_buffer, self.values = self._append(self._value_buffer, self.values, value_states)
        return self.keys, self.values

    def _append(self, buffer: _Buffer | None, states: torch.Tensor, new: torch.Tensor) -> tuple[_Buffer, torch.Tensor]:
        start = states.shape[-2] if states.numel() else 0
        end = start + new.shape[-2]
        if buffer is None or not buffer.takes(states, end):
            batch, heads, _, width = new.shape
            buffer = _Buffer(new.new_empty(batch, heads, end + self._room, width))
            if start:
                buffer.memory[:, :, :start] = states
        buffer.memory[:, :, start:end] = new
        buffer.filled = end
        return buffer, buffer.memory[:, :, :end]
