"""The GLM network of ChatGLM-6B, its head and loss, and how it is loaded, for transformers 5.

Letters: B batch, S query length, T key length, H heads, D head width, L blocks, V vocabulary, P prefix length
(P-Tuning v2), R rows of positions (2; 1 when `position_encoding_2d` is false).

A sequence is `context… [gMASK] <sop> answer… <eop>`. The context sees itself both ways, everything from the first
`<sop>` on is causal. Row 0 of the positions counts the context and then stays at the mask token; row 1 is 0 in the
context and then counts the answer. Sources: GLM (Du et al. 2022, arXiv:2103.10360), RoPE (Su et al. 2021,
arXiv:2104.09864), P-Tuning v2 (Liu et al. 2021, arXiv:2110.07602), and the published checkpoint.
"""

import inspect
import math
import os
import types
from collections.abc import Callable
from typing import ClassVar

from .configuration_chatglm import ChatGLMConfig  # first: it raises where transformers is too old for what follows

# isort: split
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .chat_chatglm import ChatMixin
from .checkpoint import PrefixEncoder, check_folder, load_prefix_encoder, translate_arguments, with_head_at_embedding
from .cuda_graphs import CACHE, StepCache, StepGraph, forget_steps, new_cache, one_cache

# Early transformers 5 brings along only what this very file imports, so the kernels of the others stand here.
from .cuda_plans import MODULES  # noqa: F401
from .cuda_runtime import launch  # noqa: F401
from .generation_chatglm import ChatGLMGenerationMixin
from .kernel_cache import keep  # noqa: F401
from .kernel_sources import FILES  # noqa: F401
from .kernels_cpu import library  # noqa: F401
from .kernels_cuda import available  # noqa: F401
from .ops import Path, attend, has_hooks, layer_norm, linear, norm_linear, path, rotate
from .quantization import (
    HalfEmbedding,
    HalfLinear,
    QuantizedLinear,
    autocast_dtype,
    check_quantizable,
    is_traced,
    quantize_linears,
)
from .sequences import check_ids, get_masks, get_position_ids, lay_out, next_in_view, refuse_packed, rotary_frequencies
from .training_loss import (
    LOSS_ARGUMENTS,
    TrainingOutput,
    causal_loss,
    check_labels,
    is_whole,
    warn_of_scores,
    with_checked_labels,
)


def _linear(config: ChatGLMConfig, in_features: int, out_features: int) -> nn.Linear:
    """A linear of a block, with quantised weights if the configuration says so."""
    if config.quantization_bit:
        return QuantizedLinear(in_features, out_features, bits=config.quantization_bit)
    return nn.Linear(in_features, out_features)


def rotary_embedding(
    position_ids: torch.Tensor, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotation, each [B, S, 1, R, D/R], for positions [B, R, S].

    Row r turns the r-th of R equal parts of the head. The frequencies are rounded to fp16 in every dtype, and in fp16
    their product with the position is too: the model was trained so, and far positions tell the difference.
    """
    frequencies = rotary_frequencies(head_dim // position_ids.shape[1], position_ids.device)
    rounded_to = torch.float16 if dtype == torch.float16 else torch.float32
    angles = position_ids.transpose(1, 2)[..., None].to(rounded_to) * frequencies.to(rounded_to)
    angles = angles.float()  # first: autocast in bfloat16 does not concatenate halves
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys [B, S, H, D] by `rotary_embedding`; pair (i, i + D/2R) within each part."""
    parts = x.unflatten(-1, cos.shape[-2:])
    first, second = parts.chunk(2, dim=-1)
    return (parts * cos + torch.cat((-second, first), dim=-1) * sin).flatten(-2)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain PyTorch: query [B, H, S, D], key and value [B, H, T, D], additive mask [B, 1, S, T].

    Returns the output [B, S, H, D] and the probabilities [B, H, S, T]. Scores are kept small until they are in fp32:
    deeper layers have larger ones, so the query is divided by the layer's number too (as the release was trained).
    """
    shrink = module.layer_idx + 1
    scores = torch.matmul(query * (scaling / shrink), key.transpose(2, 3)).float() * shrink
    if attention_mask is not None:
        scores = scores + attention_mask
    probs = nn.functional.softmax(scores, dim=-1).to(query.dtype)
    probs = nn.functional.dropout(probs, p=dropout, training=module.training)
    return torch.matmul(probs, value).transpose(1, 2), probs


class ChatGLMAttention(nn.Module):
    """Self-attention of one block, with 2-D rotary positions."""

    is_causal = False  # the mask always says what is seen

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.query_key_value = _linear(config, config.hidden_size, 3 * config.hidden_size)
        self.dense = _linear(config, config.hidden_size, config.hidden_size)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        state_dict.pop(f"{prefix}rotary_emb.inv_freq", None)  # stored by the published files, computed here
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        hidden_states: torch.Tensor,
        prefix: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        cache_position: torch.Tensor | None = None,
        output_attentions: bool = False,
        residual: torch.Tensor | None = None,
        alpha: float = 1.0,
        cache: Cache | None = None,
        qkv: torch.Tensor | None = None,
        step: StepGraph | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, hidden] → [B, S, hidden] and the probabilities [B, H, S, T], None unless asked for.

        Args:
            prefix: [2, B, H, P, D], keys and values that stand before the sequence, given once, with the prompt.
            residual: alpha · residual is added to the output.
            qkv: `query_key_value(hidden_states)`, if it is known.
            step: the recorded step that this is part of. It has keys and values of its own.
        """
        past_key_values = one_cache(past_key_values, cache)
        batch, length, _ = hidden_states.shape
        if qkv is None:
            qkv = linear(self.query_key_value, hidden_states)
        if step is not None:
            context = step.attend(self.layer_idx, qkv, *position_embeddings)
            return linear(self.dense, context, residual=residual, alpha=alpha), None
        qkv = qkv.view(batch, length, -1, 3 * self.head_dim)  # per head D queries, D keys, D values
        stored = None
        if isinstance(past_key_values, StepCache) and prefix is None:
            stored = past_key_values.store_prompt(self.layer_idx, qkv, *position_embeddings)
        query, key, value = stored or self._rotate(qkv, *position_embeddings)
        if prefix is not None:
            key = torch.cat((prefix[0].to(key.dtype), key), dim=2)  # autocast may have given them another dtype
            value = torch.cat((prefix[1].to(value.dtype), value), dim=2)
        if past_key_values is not None and stored is None:
            # The static cache of early transformers 5 keeps no count of its own.
            key, value = past_key_values.update(key, value, self.layer_idx, {"cache_position": cache_position})

        context, probs = self._attend(query, key, value, attention_mask, output_attentions, **kwargs)
        context = context.reshape(batch, length, -1)
        output = linear(self.dense, context, residual=residual, alpha=alpha)
        return output, probs if output_attentions else None

    def _rotate(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rotated queries and keys, and values, [B, H, S, D] each, of qkv [B, S, H, 3·D]."""
        rotated = rotate(self.query_key_value, qkv, cos, sin)
        query, key, value = (qkv if rotated is None else rotated).chunk(3, dim=-1)
        if rotated is None:
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        output_attentions: bool,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Query [B, H, S, D], key and value [B, H, T, D] → context [B, S, H, D], and probabilities if there are any."""
        # Only the eager implementation has probabilities to give.
        name = "eager" if output_attentions else self.config._attn_implementation
        # transformers takes these words in this file for leave to set an implementation:
        # early version 5, ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]; later,
        # ALL_ATTENTION_FUNCTIONS.get_interface(…). What is called here exists in both.
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get(name, eager_attention_forward)
        dtype = query.dtype
        if name in ("eager", "sdpa") and path(self, query) is Path.CPU:
            context = None if output_attentions else attend(query, key, value, mask, self.scaling)
            if context is not None:
                return context, None
            # PyTorch's attention in half is slow on a CPU, and rounds more.
            query, key, value = query.float(), key.float(), value.float()
            mask = None if mask is None else mask.float()
        context, probs = attention(self, query, key, value, mask, scaling=self.scaling, **kwargs)
        return context.to(dtype), None if probs is None else probs.to(dtype)


class ChatGLMMLP(nn.Module):
    """hidden → inner → hidden with GELU in its tanh form."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = _linear(config, config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = _linear(config, config.inner_hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None = None,
        alpha: float = 1.0,
        inner: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, S, hidden] → [B, S, hidden]; alpha · `residual` is added.

        `inner`: GELU of `dense_h_to_4h(hidden_states)`, if it is known.
        """
        if inner is None:
            inner = linear(self.dense_h_to_4h, hidden_states, gelu=True)
        return linear(self.dense_4h_to_h, inner, residual=residual, alpha=alpha)


class GLMBlock(GradientCheckpointingLayer):
    """One block. The residual is the *normalised* input times alpha = √(2·L); the input itself does not pass."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.alpha = math.sqrt(2 * config.num_layers)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, prefix: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, hidden] → [B, S, hidden] and the attention probabilities; arguments as of `ChatGLMAttention`."""
        normed, qkv = _enter(self.input_layernorm, self.attention, hidden_states)
        hidden_states, probs = self.attention(normed, prefix, residual=normed, alpha=self.alpha, qkv=qkv, **kwargs)
        normed, inner = _enter(self.post_attention_layernorm, self.mlp, hidden_states)
        return self.mlp(normed, residual=normed, alpha=self.alpha, inner=inner), probs


def _enter(norm: nn.LayerNorm, module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`norm(x)`, and the first product that `module` makes of it, which one kernel may compute together.

    None for the product of a module with hooks or of another class, which makes it when it is called.
    """
    if not has_hooks(module):
        if type(module) is ChatGLMAttention:
            return norm_linear(norm, module.query_key_value, x)
        if type(module) is ChatGLMMLP:
            return norm_linear(norm, module.dense_h_to_4h, x, gelu=True)
    return layer_norm(norm, x), None


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What the two model classes share: how weights are loaded, and masks and positions of a sequence of ids."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["GLMBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Stored by the published files; `rotary_embedding` computes them.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load a model; arguments and return value as of `PreTrainedModel.from_pretrained`.

        A local folder is looked over first, without reading its weights. Arguments of transformers 4 that ask for
        nothing, such as `load_in_8bit=False`, are taken.

        Raises:
            OSError: a weight file that is missing, cut short or a Git LFS pointer.
            ValueError: tensors that are missing, or whose shape or dtype disagree with the configuration; an argument
                that asks for bitsandbytes or for tensor parallelism.
        """
        folder = pretrained_model_name_or_path
        translate_arguments(kwargs)
        if folder is not None and os.path.isdir(folder):
            check_folder(cls, folder, config, kwargs)
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict):
            kwargs["device_map"] = with_head_at_embedding(device_map, cls.base_model_prefix)
        loaded = super().from_pretrained(folder, *model_args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._freeze()
        model._keep_embeddings_half()
        return loaded

    @property
    def device(self) -> torch.device:
        """The device of inputs; where accelerate offloads the embedding, the one that it is brought to for a call."""
        device = super().device
        hook = getattr(self.get_input_embeddings(), "_hf_hook", None) if device.type == "meta" else None
        execution_device = getattr(hook, "execution_device", None)
        return device if execution_device is None else torch.device(execution_device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations: that of the LayerNorms, beside which embedding and LM head can stay half."""
        return self.base_model.final_layernorm.weight.dtype

    def _keep_embeddings_half(self) -> None:
        """Make embedding and LM head of a quantised model half where that loses nothing, and keep them so."""
        halves = [module for module in self.modules() if isinstance(module, HalfEmbedding | HalfLinear)]
        for module in halves:
            module.stays_half = bool(self.config.quantization_bit)
            module.halve(halves)

    def _freeze(self) -> None:
        """Leave only trainable parameters with `requires_grad`: none of a quantised linear's, and with P-Tuning v2
        none but the prefix encoder's."""
        for module in self.modules():
            if isinstance(module, QuantizedLinear):
                module.requires_grad_(False)
        if self.config.pre_seq_len is not None:
            for name, parameter in self.named_parameters():
                if "prefix_encoder." not in name:
                    parameter.requires_grad_(False)

    def _init_weights(self, module: nn.Module) -> None:
        is_new = not getattr(getattr(module, "weight", None), "_is_hf_initialized", False)
        if isinstance(module, QuantizedLinear):
            if is_new:
                module.weight.data.random_(-128, 128)
                # Evenly spread integers up to ±q have a standard deviation of q/√3.
                largest = 2 ** (module.bits - 1)
                init.constant_(module.weight_scale, self.config.initializer_range * math.sqrt(3) / largest)
                init.zeros_(module.bias)
            return
        if hasattr(module, "is_prefix"):
            if is_new and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # P-Tuning v2 starts from torch's defaults: N(0, 1) for the embedding
            return
        super()._init_weights(module)

    def get_masks(self, input_ids: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """See `sequences.get_masks`, which takes the configuration first."""
        return get_masks(self.config, input_ids, *args, **kwargs)

    def get_position_ids(self, input_ids: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """See `sequences.get_position_ids`, which takes the configuration first."""
        return get_position_ids(self.config, input_ids, *args, **kwargs)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embedding, L GLM blocks and the final LayerNorm.

    `empty_init` is the published argument. It changes nothing: weights that will be loaded are not initialised.
    """

    def __init__(self, config: ChatGLMConfig, empty_init: bool = True):
        super().__init__(config)
        self.word_embeddings = HalfEmbedding(config.vocab_size, config.hidden_size)
        self.word_embeddings.stays_half = bool(config.quantization_bit)
        self.layers = nn.ModuleList(GLMBlock(config, layer_idx) for layer_idx in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        if config.pre_seq_len is not None:
            self.prefix_encoder = PrefixEncoder(config)
            self.dropout = nn.Dropout(0.1)
        self.post_init()
        self._freeze()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    def get_prompt(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Keys and values of P-Tuning v2, [L, 2, B, H, P, D]."""
        config = self.config
        tokens = torch.arange(config.pre_seq_len, device=device).expand(batch_size, -1)
        prefix = self.prefix_encoder(tokens).to(dtype)
        prefix = prefix.view(batch_size, -1, config.num_layers, 2, config.num_attention_heads, config.head_dim)
        return self.dropout(prefix).permute(2, 3, 0, 4, 1, 5)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """Run the blocks.

        Args:
            input_ids: int64 [B, S].
            position_ids: int64 [B, 2, S] ([B, S] with 1-D positions); derived from the ids by default, and where
                they merely count the columns, [B, S].
            attention_mask: [B, T] with 1 = real; or the public form, bool [B, 1, S, T] with True = hidden, or its
                opposite, which transformers writes (see `hidden_keys`); or floats [B, 1, S, T] to add to the scores. By
                default all ids are real, and what they see follows from them.
            past_key_values: keys and values so far; with P-Tuning v2 they begin with the prefix. `cache` is another
                name of this argument.
            inputs_embeds: float [B, S, hidden] in place of ids. Needs `position_ids` (and with 1-D positions a 4-D
                mask), since both come from the ids.

        Returns:
            `last_hidden_state` [B, S, hidden], `past_key_values` (which transformers names `cache` since 5.24),
            `hidden_states` (L + 1 of [B, S, hidden], the last one normalised) and `attentions` (L of [B, H, S, T]).

        Raises:
            ValueError: ids, positions or masks in none of these forms, packed sequences, a prompt in several pieces.
        """
        config = self.config
        past_key_values = one_cache(past_key_values, cache)
        use_cache = config.use_cache if use_cache is None else use_cache
        return_dict = config.return_dict if return_dict is None else return_dict
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds: got both or neither.")
        if inputs_embeds is None:
            check_ids(config, input_ids)
            inputs_embeds = self.word_embeddings(input_ids).to(self.dtype)
        if use_cache and past_key_values is None:
            past_key_values = new_cache(config, inputs_embeds.device)
        refuse_packed(kwargs)
        layout = lay_out(config, input_ids, inputs_embeds, position_ids, attention_mask, past_key_values)
        prefixes = [None] * config.num_layers
        if layout.is_start and config.pre_seq_len is not None:
            prefixes = self.get_prompt(len(inputs_embeds), inputs_embeds.device, inputs_embeds.dtype)
        block_kwargs = {
            "attention_mask": layout.mask,
            "position_embeddings": rotary_embedding(layout.position_ids, config.head_dim, inputs_embeds.dtype),
            CACHE: past_key_values,
            "cache_position": layout.cache_position,
            "output_attentions": output_attentions,
            **kwargs,
        }
        hidden_states, attentions = inputs_embeds, []
        all_hidden_states = () if output_hidden_states else None
        for block, prefix in zip(self.layers, prefixes, strict=True):
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            hidden_states, probs = block(hidden_states, prefix, **block_kwargs)
            attentions.append(probs)
        hidden_states = layer_norm(self.final_layernorm, hidden_states)
        if output_hidden_states:
            all_hidden_states += (hidden_states,)

        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=all_hidden_states,
            attentions=tuple(attentions) if output_attentions else None,
            **{CACHE: past_key_values if use_cache else None},
        )
        return output if return_dict else output.to_tuple()

    def run_step(self, step: StepGraph) -> torch.Tensor:
        """The blocks and the final LayerNorm in a recorded step: [B, 1, hidden]."""
        hidden_states, *position_embeddings = step.begin(self.word_embeddings.weight)
        for block in self.layers:
            hidden_states, _ = block(hidden_states, position_embeddings=position_embeddings, step=step)
        return layer_norm(self.final_layernorm, hidden_states)


class ChatGLMForConditionalGeneration(ChatMixin, ChatGLMPreTrainedModel, ChatGLMGenerationMixin):
    """ChatGLM: the network with its LM head, `generate`, `chat` and `stream_chat`."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig, empty_init: bool = True):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = HalfLinear(config.hidden_size, config.vocab_size)
        self.lm_head.stays_half = bool(config.quantization_bit)
        self.post_init()
        self._freeze()

    def __setattr__(self, name: str, value) -> None:
        # TRL and Liger put a forward here that fuses head and loss, and passes the labels by the one below.
        if name == "forward" and inspect.ismethod(value):
            value = types.MethodType(
                with_checked_labels(value.__func__, inspect.signature(type(self).forward)), value.__self__
            )
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> "ChatGLMForConditionalGeneration":
        if mode:
            forget_steps(self)
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        forget_steps(self)  # weights move or change their dtype
        return super()._apply(fn, recurse)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.word_embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def tie_weights(self, missing_keys: set[str] | None = None, **kwargs) -> None:
        # Published files store the embedding under both names, which early transformers 5 takes for two tensors.
        stored = missing_keys is not None and "transformer.word_embeddings.weight" not in missing_keys
        if stored and self.config.tie_word_embeddings:
            missing_keys.add("lm_head.weight")
        super().tie_weights(missing_keys=missing_keys, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Scores over the vocabulary; arguments and errors as of `ChatGLMModel.forward`, and:

        Args:
            labels: int64 [B, S], the ids themselves with -100 where no loss is wanted; shifted by one in here.
            logits_to_keep: scores for this many last positions only (0 = all), or for these columns.

        Returns:
            `logits` [B, S, V], `loss` (a scalar, fp32) with labels, and what `ChatGLMModel` returns beside. With labels
            and gradients the logits are computed when they are read (see `TrainingOutput`).
        """
        past_key_values = one_cache(past_key_values, cache)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        recorded = isinstance(past_key_values, StepCache) and past_key_values.knows_position()
        a_step = input_ids is not None and input_ids.shape[1] == 1 and position_ids is None and labels is None
        if recorded and a_step and not (output_attentions or output_hidden_states):
            # See `prepare_inputs_for_generation`.
            return CausalLMOutputWithPast(logits=past_key_values.step(input_ids), **{CACHE: past_key_values})
        # What the loss takes is not for the blocks.
        for_loss = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        is_own_loss = labels is not None and self._has_own_loss
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if not is_traced() and not is_own_loss and is_whole(input_ids, inputs_embeds, past_key_values):
            if labels is not None:
                check_labels(self.config, labels, input_ids, position_ids, attention_mask, **for_loss)
            elif kept != slice(-1, None):
                in_view = next_in_view(self.config, input_ids, position_ids, attention_mask)
                warn_of_scores(self.config, in_view, kept, self.training and torch.is_grad_enabled())
        output = self.transformer(
            input_ids,
            position_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        hidden_states = output.last_hidden_state
        fields = {name: output[name] for name in (CACHE, "hidden_states", "attentions") if name in output}
        if labels is None:
            output = CausalLMOutputWithPast(logits=self.score(hidden_states[:, kept]), **fields)
        else:
            output = self._with_loss(hidden_states, kept, labels, fields, for_loss, kwargs)
        return output if return_dict else output.to_tuple()

    @property
    def _has_own_loss(self) -> bool:
        """Whether a user has put another loss in the place of transformers' own."""
        return self.loss_function is not ForCausalLMLoss

    def _with_loss(
        self, hidden_states: torch.Tensor, kept, labels: torch.Tensor, fields: dict, for_loss: dict, others: dict
    ) -> CausalLMOutputWithPast:
        """The output with loss, and with logits of the `kept` columns."""
        vocab_size = self.config.vocab_size
        # A user's own loss; and neither a compiled graph nor DataParallel can hand out what is not computed yet.
        if self._has_own_loss or torch.compiler.is_compiling() or hasattr(self, "_is_replica"):
            logits = self.score(hidden_states)
            loss = self.loss_function(logits, labels, vocab_size=vocab_size, **for_loss, **others)
            return CausalLMOutputWithPast(loss=loss, logits=logits[:, kept], **fields)
        if not torch.is_grad_enabled():
            logits = self.score(hidden_states)
            loss = causal_loss(lambda scores: scores, logits, labels, vocab_size, **for_loss)
            return CausalLMOutputWithPast(loss=loss, logits=logits[:, kept], **fields)
        loss = causal_loss(self.score, hidden_states, labels, vocab_size, **for_loss)
        kind = hidden_states.device.type
        cast_to = autocast_dtype(kind)

        def logits() -> torch.Tensor:
            with torch.autocast(kind, dtype=cast_to, enabled=cast_to is not None):
                return self.score(hidden_states[:, kept])

        return TrainingOutput.make(logits, self.lm_head, loss, **fields)

    def run_step(self, step: StepGraph) -> torch.Tensor:
        """The kernels of a recorded step, launched one by one: scores [B, 1, V]."""
        hidden_states = self.transformer.run_step(step)
        logits = self.score(hidden_states)
        step.end(hidden_states)
        return logits

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scores [B, S, V] of hidden states [B, S, hidden]."""
        return linear(self.lm_head, hidden_states)

    def quantize(self, bits: int, quantize_embeddings: bool = False, **published) -> "ChatGLMForConditionalGeneration":
        """Quantise the blocks' linears to 8 or 4 bits in place, layer by layer, wherever they are; returns the model.

        Args:
            bits: 8 or 4.
            quantize_embeddings: must be False, as in the configuration.
            **published: arguments of the published method that chose its kernels and buffers (`kernel_file`,
                `use_quantization_cache`, `compile_parallel_kernel`, `parallel_num`, `empty_init`): without effect.

        Raises:
            ValueError: other bits, a model that is quantised to other bits already, one with adapters of PEFT, or
                weights that are offloaded.
            TypeError: other arguments.
        """
        check_quantizable(self, bits, quantize_embeddings, published)
        quantize_linears(self.transformer.layers, bits)
        self.config.quantization_bit = bits
        self._keep_embeddings_half()
        return self

    def load_prefix(self, path: str | os.PathLike) -> "ChatGLMForConditionalGeneration":
        """Put in a P-Tuning v2 prefix, from a file or a folder that holds `transformer.prefix_encoder.*`.

        `pre_seq_len` and `prefix_projection` are read off the shapes. Everything but the prefix is frozen. Returns the
        model.

        Raises:
            OSError: no readable file there.
            ValueError: a file without a prefix, or with one of another model's shape.
        """
        encoder, found = load_prefix_encoder(path, self.config, self.device, self.dtype)
        forget_steps(self)  # recorded without the prefix
        self.config.update(found)
        self.transformer.prefix_encoder = encoder
        self.transformer.dropout = nn.Dropout(0.1)
        self.transformer.train(self.training)
        self._freeze()
        return self


ChatGLMForConditionalGeneration.register_for_auto_class("AutoModel")
# By the class names here, Trainer knows whose labels to shift when it smooths them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ChatGLMConfig.model_type] = ChatGLMForConditionalGeneration.__name__
