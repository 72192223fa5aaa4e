"""Masks and positions of `context… [gMASK] <sop> answer… <eop>`, as functions of the ids.

Letters as in `modeling_chatglm`. The context sees itself both ways, everything from the first `<sop>` on is causal. Row
0 of the positions counts the context and then stays at the mask token; row 1 is 0 in the context and then counts the
answer.
"""

import dataclasses

import torch
from transformers.cache_utils import Cache

from .configuration_chatglm import ChatGLMConfig
from .quantization import autocast_dtype, is_traced


def check_ids(config: ChatGLMConfig, input_ids: torch.Tensor) -> None:
    """Raise a ValueError for what is no tensor of ids, for empty sequences, for ids [B, S] outside the vocabulary."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
        got = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise ValueError(f"input_ids must be an int64 tensor [B, S], as tokenizer(…) makes them; got {got}.")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids have shape {list(input_ids.shape)}, and [B, S] was expected: a row a sequence.")
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
    [B, S] (1 = real), is masked.
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


def check_positions(config: ChatGLMConfig, position_ids: torch.Tensor, batch: int, length: int) -> None:
    """Raise a ValueError unless positions are [B, 2, S] ([B, S] with 1-D positions); B may be 1 for all."""
    rows = (2,) if config.position_encoding_2d else ()
    if tuple(position_ids.shape) not in ((batch, *rows, length), (1, *rows, length)):
        raise ValueError(
            f"position_ids have shape {list(position_ids.shape)}, and this model takes {[batch, *rows, length]}: leave "
            "them out, or take them from model.get_position_ids(input_ids)."
        )


def check_counted(
    position_ids: torch.Tensor,
    batch: int,
    length: int,
    attention_mask: torch.Tensor | None,
    past_length: int | torch.Tensor,
) -> None:
    """Raise a ValueError unless positions are [B, S] and count the columns, or the real ones of a mask [B, T].

    Libraries pass such positions to any model. They say nothing new: 2-D positions can be derived as without them.
    """
    fits = tuple(position_ids.shape) in ((batch, length), (1, length))
    if fits and not is_traced():
        is_counted = position_ids == torch.arange(length, device=position_ids.device) + past_length
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask.bool()
            counted = (real.long().cumsum(dim=1) - 1)[:, -length:]
            is_counted = is_counted.all(dim=1, keepdim=True) | (position_ids == counted) | ~real[:, -length:]
        fits = is_counted.all()
    if not fits:
        raise ValueError(
            f"position_ids of shape {list(position_ids.shape)} do not count the columns, and this model's have shape "
            f"{[batch, 2, length]}: leave them out, or take them from model.get_position_ids(input_ids). Packed "
            "sequences (padding-free batches) can't be used, since each prompt sees itself both ways: pad the batch."
        )


def check_not_packed(position_ids: torch.Tensor) -> None:
    """Raise a ValueError for 1-D positions [B, S] that begin again within a row."""
    before, here, after = position_ids[:, :-2], position_ids[:, 1:-1], position_ids[:, 2:]
    if not is_traced() and ((before > 0) & (here == 0) & (after == 1)).any():
        raise ValueError(
            "position_ids begin again within a row. Packed sequences (padding-free batches) can't be used, since each "
            "prompt sees itself both ways: pad the batch."
        )


def check_one_piece(
    config: ChatGLMConfig, input_ids: torch.Tensor, position_ids: torch.Tensor, known_ids: torch.Tensor | None
) -> None:
    """Raise a ValueError if ids [B, S] that follow others in a cache begin in a prompt, before its `<sop>`.

    `known_ids` are those before them, if the cache knows them. Else 2-D positions tell: row 1 moves on in an answer.
    """
    start = answer_start(config, input_ids)
    in_prompt = (start > 0) & (start < input_ids.shape[1])
    if known_ids is not None:
        in_prompt &= (known_ids != config.bos_token_id).all(dim=1, keepdim=True)
    elif config.position_encoding_2d:
        columns = torch.arange(1, input_ids.shape[1], device=input_ids.device)
        stays = position_ids[:, 1].diff(dim=1) != 1
        in_prompt &= (stays & (columns <= start)).any(dim=1, keepdim=True)
    else:
        return
    if in_prompt.any():
        raise ValueError(
            "A prompt sees itself both ways, so it is read in one forward on an empty cache; got one whose <sop> comes "
            "later than the first token after a filled cache. If PEFT's prefix tuning filled it: use this model's own "
            "P-Tuning v2 instead (config.pre_seq_len, model.load_prefix)."
        )


def check_mask(attention_mask: torch.Tensor, batch: int, length: int, widths: range) -> None:
    """Raise a ValueError unless a mask is [B, T] or [B, 1 or H, S, T], with T one of `widths`; B may be 1 for all."""
    shape = tuple(attention_mask.shape)
    fits = len(shape) in (2, 4) and shape[0] in (1, batch) and shape[-1] in widths
    if not fits or (len(shape) == 4 and shape[2] != length):
        keys = widths[-1]
        raise ValueError(
            f"attention_mask has shape {list(shape)}, and {[batch, keys]} or {[batch, 1, length, keys]} was expected: "
            f"{batch} sequences, {length} new tokens, {keys} tokens with those in the cache."
        )


def hidden_keys(marks: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A mask of bools or integers [B, 1 or H, S, T] in the public form, bool with True = hidden.

    transformers writes the opposite, True = seen. A mask is taken for one of those where it can't be public: where a
    query would not see itself, though others see it, or where no query would see itself.

    `columns` [S] are the queries' own among the T keys.
    """
    marks = marks.bool()
    queries = torch.arange(len(columns), device=marks.device)

    def is_possible(seen: torch.Tensor) -> torch.Tensor:
        themselves = seen[..., queries, columns]
        by_any = seen[..., columns].any(dim=-2)
        return (themselves | ~by_any).all() & themselves.any(dim=-1).all()

    return torch.where(~is_possible(~marks) & is_possible(marks), ~marks, marks)


def next_in_view(
    config: ChatGLMConfig,
    input_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor | None:
    """Which columns of a sequence see the token after them, whose scores they give: bool [B, S].

    None if that can't be told.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        length = attention_mask.shape[2]
        if attention_mask.is_floating_point():
            prefix_length = (config.pre_seq_len or 0) if attention_mask.shape[3] > length else 0
            hidden = attention_mask[..., prefix_length : prefix_length + length] < -1e3
        else:
            hidden = hidden_keys(attention_mask, torch.arange(length, device=attention_mask.device))[..., :length]
        in_view = ~hidden.diagonal(1, -2, -1).all(dim=1)
    elif input_ids is not None:
        columns = torch.arange(1, input_ids.shape[1], device=input_ids.device)
        in_view = columns < answer_start(config, input_ids)
    elif config.position_encoding_2d and position_ids is not None and position_ids.ndim == 3:
        in_view = position_ids[:, -1, 1:] == 0
    else:
        return None
    return torch.nn.functional.pad(in_view, (0, 1))


# Arguments of attention over packed sequences.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def refuse_packed(kwargs: dict) -> None:
    """Raise a ValueError for arguments of attention over packed sequences."""
    given = [name for name in _PACKED if name in kwargs]
    if given:
        raise ValueError(
            f"Packed sequences ({', '.join(given)}) can't be used, since each prompt sees itself both ways: pad the "
            "batch."
        )


_OWN_PREFIX = "use this model's own P-Tuning v2 instead (config.pre_seq_len, model.load_prefix)"


class _Past:
    """What a cache holds before S new tokens.

    Attributes:
        length: keys, with those of a prefix: an int, but a tensor (not to be waited for) in a static cache in use.
        is_start: whether it is known to be empty.
        ids: how many ids have keys.
        is_static: whether the cache has all its columns from the start.
        is_foreign: whether its class is not transformers'. It may have more columns than tokens; masks fit those.
    """

    def __init__(self, config: ChatGLMConfig, cache: Cache | None, new: int):
        self.length = 0 if cache is None else cache.get_seq_length()
        is_known = isinstance(self.length, int) or (new > 1 and not is_traced())
        self.is_start = is_known and int(self.length) == 0
        self.ids = 0 if self.is_start else self.length - (config.pre_seq_len or 0)
        self.is_static = cache is not None and cache.is_compileable
        self.is_foreign = cache is not None and not isinstance(cache, Cache)


@dataclasses.dataclass
class Layout:
    """Where new tokens stand and what they see.

    Attributes:
        position_ids: int64 [B, R, S].
        mask: what is added to the scores, [B or 1, 1, S, T]; None where all keys are seen.
        cache_position: the columns of the cache that are written: int64 [S], with those of a prefix [P + S].
        is_start: whether the sequences begin here.
    """

    position_ids: torch.Tensor
    mask: torch.Tensor | None
    cache_position: torch.Tensor
    is_start: bool


def lay_out(
    config: ChatGLMConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
) -> Layout:
    """Positions and mask of new tokens; arguments and errors as of `ChatGLMModel.forward`.

    `inputs_embeds` [B, S, hidden] are there beside ids, too.
    """
    batch, length, _ = inputs_embeds.shape
    prefix_length = config.pre_seq_len or 0
    past = _Past(config, cache, length)
    columns = cache.layers[0].max_cache_len if past.is_static else None
    if attention_mask is not None and not past.is_foreign and isinstance(past.ids, int) and not is_traced():
        widest = past.ids + length if columns is None else columns - prefix_length
        check_mask(attention_mask, batch, length, range(past.ids + length, widest + 1))
    position_ids, known_ids = _positions(config, input_ids, inputs_embeds, position_ids, attention_mask, cache, past)
    if length > 1 and not past.is_start and input_ids is not None and not is_traced():
        check_one_piece(config, input_ids, position_ids, known_ids)

    start = prefix_length if past.is_start else past.length
    queries = torch.arange(length, device=inputs_embeds.device) + start
    mask = None
    if length > 1 or attention_mask is not None or past.is_static:
        keys = start + length if columns is None else columns
        if past.is_foreign and attention_mask is not None and attention_mask.ndim == 4:
            keys = attention_mask.shape[-1]
        context = _context(config, input_ids, position_ids, attention_mask, past, length)
        # As attention wants it: of the queries' dtype.
        dtype = autocast_dtype(inputs_embeds.device.type) or inputs_embeds.dtype
        mask = additive_mask(config, attention_mask, context, queries, keys, dtype)
    written = queries
    if past.is_start and prefix_length:
        written = torch.arange(start + length, device=inputs_embeds.device)
    rows = position_ids if config.position_encoding_2d else position_ids[:, None]
    return Layout(rows, mask, written, past.is_start)


def _positions(
    config: ChatGLMConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    past: _Past,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Positions of the new tokens, given or derived, and the ids before them where the cache knows those."""
    batch, length, _ = inputs_embeds.shape
    if position_ids is not None and position_ids.ndim == 2 and config.position_encoding_2d:
        check_counted(position_ids, batch, length, attention_mask, past.ids)
        position_ids = None
    if position_ids is None:
        stored = past.ids if isinstance(past.ids, int) else None
        return _positions_from_ids(config, input_ids, attention_mask, cache, stored)
    check_positions(config, position_ids, batch, length)
    if position_ids.ndim == 2 and past.is_start:
        check_not_packed(position_ids)
    if hasattr(cache, "chatglm_ids"):
        del cache.chatglm_ids  # would lack these
    return position_ids, None


def _positions_from_ids(
    config: ChatGLMConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    stored: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the new ids, and the ids before them. Positions follow from all ids so far, which the cache
    remembers for the next call.

    `stored`: how many ids have keys in the cache; None for a static cache that is in use, which is not asked.
    """
    if input_ids is None:
        raise ValueError(
            "inputs_embeds need position_ids beside them, as positions come from the ids. PEFT's prompt tuning and "
            f"P-tuning have none: {_OWN_PREFIX}."
        )
    batch, new = input_ids.shape
    known = input_ids[:, :0]
    if stored != 0:
        known = getattr(past_key_values, "chatglm_ids", known)[:, :stored]  # it may have been cropped
        if known.shape[0] != batch or known.shape[1] < (stored or 1):
            raise ValueError(
                "A step on a cache that was filled with explicit position_ids, or has other sequences by now, "
                "needs position_ids again: pass model.get_position_ids(all_ids_so_far)[..., -new:]. If PEFT's "
                f"prefix tuning filled the cache: {_OWN_PREFIX}."
            )
    all_ids = torch.cat((known, input_ids), dim=1)
    if past_key_values is not None:
        past_key_values.chatglm_ids = all_ids
    if attention_mask is not None and attention_mask.ndim == 4:
        attention_mask = None  # does not tell padding from context
    return get_position_ids(config, all_ids, attention_mask=attention_mask)[..., -new:], known


def _context(
    config: ChatGLMConfig,
    input_ids: torch.Tensor | None,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past: _Past,
    length: int,
) -> torch.Tensor | None:
    """Whose keys are seen by all, bool [B, S]; None where there are none, or where a 4-D mask says it."""
    may_start = past.is_start or (not isinstance(past.length, int) and is_traced())
    if not may_start or length == 1 or (attention_mask is not None and attention_mask.ndim == 4):
        return None
    if input_ids is not None:
        context = torch.arange(length, device=input_ids.device) < answer_start(config, input_ids)
    elif config.position_encoding_2d:
        context = position_ids[:, 1] == 0
    else:
        raise ValueError("With inputs_embeds and 1-D positions, pass a 4-D attention_mask: it needs the ids.")
    return context if past.is_start else context & (past.length == 0)


def additive_mask(
    config: ChatGLMConfig,
    attention_mask: torch.Tensor | None,
    context: torch.Tensor | None,
    slots: torch.Tensor,
    key_length: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What is added to the scores, [B or 1, 1, S, T]: 0 where seen, the dtype's lowest number where hidden.

    `slots` [S] are the queries' own places among the T keys. The P prefix keys come first, seen by all;
    keys after the last query are places of a static cache that are not filled yet.
    """
    prefix_length = config.pre_seq_len or 0
    lowest = torch.finfo(dtype).min

    def over_keys(marks: torch.Tensor, of_prefix: float, of_unfilled: float) -> torch.Tensor:
        """Marks of the sequence's keys [..., ≤ T - P], widened to all T keys."""
        unfilled = key_length - prefix_length - marks.shape[-1]
        marks = torch.nn.functional.pad(marks, (prefix_length, 0), value=of_prefix)
        return torch.nn.functional.pad(marks, (0, unfilled), value=of_unfilled)

    if attention_mask is not None and attention_mask.ndim == 4:
        if attention_mask.is_floating_point():
            # A dtype may round the lowest number of another to minus infinity, and rows of those would give NaN.
            added = attention_mask.to(dtype).clamp(min=lowest)
            return added if added.shape[-1] == key_length else over_keys(added, 0.0, lowest)
        hidden = over_keys(hidden_keys(attention_mask, slots - prefix_length), False, True)
    else:
        seen = torch.arange(key_length, device=slots.device) <= slots[:, None]
        if context is not None:
            seen = seen | over_keys(context, False, False)[:, None]
        if attention_mask is not None:
            seen = seen & over_keys(attention_mask.bool(), True, True)[:, None]
        hidden = ~seen.view(-1, 1, *seen.shape[-2:])
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, lowest)


def rotary_frequencies(width: int, device: torch.device) -> torch.Tensor:
    """Angles of a rotation by one position, half [width / 2]: 10000^(-2j / width).

    They are rounded to fp16 in every dtype, as the model was trained.
    """
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    return (1.0 / 10000.0**exponents).half()
