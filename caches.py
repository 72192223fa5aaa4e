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
        raise ValueError("past_key_values and cache are two names of the same argument: pass one of them.")
    return past_key_values if cache is None else cache


class GrowingLayer(DynamicLayer):
    """Keys and values of a block in buffers with room for more, so that a step writes one column and copies nothing.

    Attributes:
        keys, values: [B, H, T, D], views of the buffers.
    """

    _room = 256  # columns

    def lazy_initialization(self, *args) -> None:
        """Called before the first keys are stored."""
        super().lazy_initialization(*args)
        self._buffers = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append [B, H, S, D] to each; returns all keys and values, [B, H, T + S, D]."""
        if key_states.requires_grad or is_traced():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        start = states.shape[-2] if states.numel() else 0
        end = start + new.shape[-2]
        buffer = self._buffers.get(name)
        # Beam search and users put other tensors in the place of the views.
        is_view = buffer is not None and (states.data_ptr(), states.stride()) == (buffer.data_ptr(), buffer.stride())
        if is_view and buffer.is_inference() and not torch.is_inference_mode_enabled():
            is_view = False  # may not be written to any more
        if not is_view or end > buffer.shape[-2] or states.shape[0] != buffer.shape[0]:
            batch, heads, _, width = new.shape
            buffer = self._buffers[name] = new.new_empty(batch, heads, end + self._room, width)
            if start:
                buffer[:, :, :start] = states
        buffer[:, :, start:end] = new
        return buffer[:, :, :end]
