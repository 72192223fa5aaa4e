"""Masks and positions of `context… [gMASK] <sop> answer… <eop>`, as functions of the ids.

Letters as in `modeling_chatglm`. The context sees itself both ways, everything from the first `<sop>` on is causal. Row
0 of the positions counts the context and then stays at the mask token; row 1 is 0 in the context and then counts the
answer.
"""

import torch

from .configuration_chatglm import ChatGLMConfig
from .quantization import is_traced


def check_ids(config: ChatGLMConfig, input_ids: torch.Tensor) -> None:
    """Raise a ValueError for empty sequences, or for ids [B, S] outside the vocabulary."""
    if input_ids.shape[1] == 0:
        raise ValueError(f"The sequences are empty: input_ids has shape {list(input_ids.shape)}. Give some text.")
    # A look at ids on a GPU means waiting for it, which a step of one token, the model's own, can't afford.
    if (input_ids.shape[1] > 1 or input_ids.device.type == "cpu") and not is_traced():
        low, high = input_ids.aminmax()
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"input_ids go from {int(low)} to {int(high)}, but this model has ids 0 to "
                f"{config.vocab_size - 1}. Was the text encoded with the tokenizer of another model?"
            )


def _first_column(marks: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
    """Column [B, 1] of the first True of each row of bool [B, S], or the default [B, 1] where there is none."""
    return torch.where(marks.any(dim=1, keepdim=True), marks.int().argmax(dim=1, keepdim=True), default)


def answer_start(config: ChatGLMConfig, input_ids: torch.Tensor) -> torch.Tensor:
    """Column [B, 1] of the first `<sop>`, or S."""
    none = torch.full_like(input_ids[:, :1], input_ids.shape[1])
    return _first_column(input_ids == config.bos_token_id, none)


def get_masks(
    config: ChatGLMConfig,
    input_ids: torch.Tensor,
    device: torch.device | str | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Who is hidden from whom: bool [B, 1, S, S], True = hidden, for ids [B, S].

    Key j is seen by query i if j stands before the first `<sop>` or j ≤ i. Padding, known from `attention_mask`
    [B, S] (1 = real), is seen by nobody.
    """
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    seen = (columns < answer_start(config, input_ids))[:, None, :] | (columns <= columns[:, None])
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, :]
    return ~seen[:, None].to(device or input_ids.device)


def get_position_ids(
    config: ChatGLMConfig,
    input_ids: torch.Tensor,
    mask_positions: list[int] | torch.Tensor | None = None,
    device: torch.device | str | None = None,
    use_gmasks: list[bool] | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Positions int64 [B, 2, S] ([B, S] with 1-D positions) for ids [B, S].

    Args:
        mask_positions: index of the mask token in each sequence, counted without padding; by default that of the
            first `[gMASK]` of the context, else of its first `[MASK]`, else that of its last token.
        use_gmasks: whether the mask token is `[gMASK]`; matters to 1-D positions only, which stay at a `[MASK]`.
        attention_mask: [B, S], 1 = real. Padding on the left is not counted.
    """
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    start = answer_start(config, input_ids)
    in_context = columns < start
    counted = columns.expand_as(input_ids)
    if attention_mask is not None:
        counted = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    gmasks = (input_ids == config.gmask_token_id) & in_context
    if mask_positions is None:
        masks = (input_ids == config.mask_token_id) & in_context
        column = _first_column(gmasks, _first_column(masks, (start - 1).clamp(min=0)))
        mask_position = counted.gather(1, column)
    else:
        mask_position = torch.as_tensor(mask_positions, device=input_ids.device).view(-1, 1)
    if config.position_encoding_2d:
        place = torch.where(in_context, counted, mask_position)
        position_ids = torch.stack((place, (columns - start + 1).clamp(min=0)), dim=1)
    else:
        if use_gmasks is None:
            stays = ~gmasks.any(dim=1, keepdim=True)
        else:
            stays = ~torch.as_tensor(use_gmasks, device=input_ids.device).view(-1, 1)
        position_ids = torch.where(stays & ~in_context, mask_position, counted)
    return position_ids.to(device or input_ids.device)


def additive_mask(
    config: ChatGLMConfig,
    attention_mask: torch.Tensor | None,
    context: torch.Tensor | None,
    slots: torch.Tensor,
    key_length: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What is added to the scores, [B or 1, 1, S, T]: 0 where seen, the dtype's lowest number where hidden.

    `slots` [S] are the queries' own places among the T keys, of which the P prefix keys come first, seen by all;
    keys after the last query are places of a static cache that are not filled yet.
    """
    if attention_mask is not None and attention_mask.is_floating_point() and attention_mask.ndim == 4:
        return attention_mask.to(dtype)
    prefix_length = config.pre_seq_len or 0

    def over_keys(marks: torch.Tensor, outside: bool) -> torch.Tensor:
        """Marks of the sequence's keys [..., ≤ T - P], widened to all T keys."""
        unfilled = key_length - prefix_length - marks.shape[-1]
        return torch.nn.functional.pad(marks.bool(), (prefix_length, unfilled), value=outside)

    if attention_mask is not None and attention_mask.ndim == 4:
        hidden = over_keys(attention_mask, False)
    else:
        seen = torch.arange(key_length, device=slots.device) <= slots[:, None]
        if context is not None:
            seen = seen | over_keys(context, False)[:, None]
        if attention_mask is not None:
            seen = seen & over_keys(attention_mask, True)[:, None]
        hidden = ~seen.view(-1, 1, *seen.shape[-2:])
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)
