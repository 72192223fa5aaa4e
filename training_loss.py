"""The loss of fine-tuning over a large vocabulary, without the scores of a whole batch.

Letters: B batch, S sequence length, R rows, V vocabulary.

For 2048 tokens the scores over 130528 ids take 0.5 GB in half; computed in float32 with their gradient, 4 GB. So the
loss takes the LM head by a few hundred rows at a time, and computes them again for the gradient (gradient
checkpointing: Chen et al. 2016, arXiv:1604.06174). Rows without a label are left out.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .configuration_chatglm import ChatGLMConfig
from .quantization import is_traced
from .sequences import answer_start, next_in_view

logger = logging.get_logger(__name__)

# Arguments of `causal_loss` that the model's forward hands on.
LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")

# Scores that exist at the same time: 128 MB in float32.
_CHUNK_NUMEL = 1 << 25


def _shifted(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Labels [B, S] → the label of each column's scores [B, S]: that of the next column; of the last one, none."""
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def has_label(
    labels: torch.Tensor, ignore_index: int = -100, shift_labels: torch.Tensor | None = None, **_
) -> torch.Tensor:
    """Whether a column's scores enter the loss, bool [B, S]; arguments as of `causal_loss`."""
    return (_shifted(labels, ignore_index) if shift_labels is None else shift_labels) != ignore_index


def causal_loss(
    score: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of the next tokens in float32, a scalar: what transformers' `ForCausalLMLoss` gives.

    Args:
        score: the LM head, rows [R, hidden] → [R, V].
        hidden_states: [B, S, hidden].
        labels: int64 [B, S], shifted by one in here.
        num_items_in_batch: what the sum is divided by; the number of labels by default, which gives NaN if there are
            none.
        ignore_index: the label of rows without one.
        shift_labels: int64 [B, S], labels that are shifted already, in place of `labels`.

    Raises:
        ValueError: labels of another shape than [B, S].
    """
    if shift_labels is None:
        shift_labels = _shifted(labels, ignore_index)
    if shift_labels.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"labels have shape {list(shift_labels.shape)}, the sequences {list(hidden_states.shape[:-1])}: give one "
            "label for each id, -100 where no loss is wanted."
        )
    targets = shift_labels.reshape(-1).to(hidden_states.device)
    labelled = (targets != ignore_index).nonzero().squeeze(1)
    rows = hidden_states.flatten(0, -2)

    def part(some: torch.Tensor) -> torch.Tensor:
        scores = score(rows[some]).float()
        return nn.functional.cross_entropy(scores, targets[some].to(scores.device), reduction="sum")

    total = 0.0
    # No labels make one chunk without rows: its zero hangs together with the parameters, as DDP wants it.
    for some in labelled.split(max(1, _CHUNK_NUMEL // vocab_size)):
        total = total + checkpoint(part, some, use_reentrant=False)
    if num_items_in_batch is None:
        num_items_in_batch = len(labelled)
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


class _Unread:
    """Logits that are not computed yet, and the weights they need as they were at the forward."""

    def __init__(self, compute: Callable[[], torch.Tensor], head: nn.Module):
        self._compute, self._head = compute, head
        self._versions = self._count_changes()

    def _count_changes(self) -> list[int]:
        """PyTorch counts in-place changes of each tensor; tensors of inference mode don't change."""
        return [weight._version for weight in self._head.parameters() if not weight.is_inference()]

    def read(self) -> torch.Tensor:
        if self._count_changes() != self._versions:
            raise RuntimeError(
                "The LM head has other weights by now than in the forward that made this output, and so would the "
                "logits: read output.logits before optimizer.step(), or call the model again."
            )
        return self._compute()


@dataclass
class TrainingOutput(CausalLMOutputWithPast):
    """A `CausalLMOutputWithPast` whose `logits` [B, S, V] are computed when they are first read.

    Training loops read the loss alone. By attribute, by name and by place is reading; `items()` and `values()`, with
    which libraries go through outputs, have something in the logits' place that is no tensor until then. Reading
    raises a RuntimeError once the LM head's weights have changed.
    """

    @classmethod
    def make(
        cls, compute_logits: Callable[[], torch.Tensor], head: nn.Module, loss: torch.Tensor, **fields
    ) -> "TrainingOutput":
        """An output whose logits are what `compute_logits` returns, from the weights of `head`."""
        return cls({"loss": loss, "logits": _Unread(compute_logits, head), **fields})

    @property
    def logits(self) -> torch.Tensor | None:
        value = self.__dict__.get("logits")
        if isinstance(value, _Unread):
            self.logits = value = value.read()
        return value

    @logits.setter
    def logits(self, value) -> None:
        self.__dict__["logits"] = value

    def __getitem__(self, key):
        return self.logits if key == "logits" else super().__getitem__(key)

    def get(self, key, default=None):
        return self.logits if key == "logits" and key in self else super().get(key, default)


def check_labels(
    config: ChatGLMConfig,
    labels: torch.Tensor,
    input_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **for_loss,
) -> None:
    """Raise a ValueError where the loss of whole sequences would be on tokens in view; arguments as of the model."""
    in_view = next_in_view(config, input_ids, position_ids, attention_mask)
    _check_targets(config, has_label(labels, **for_loss), in_view, input_ids)


def _check_targets(
    config: ChatGLMConfig, targets: torch.Tensor, in_view: torch.Tensor | None, input_ids: torch.Tensor | None
) -> None:
    """Raise a ValueError where the loss would be on tokens in view.

    `targets` bool [B, S]: whether a column's scores enter the loss. `in_view` [B, S]: see `next_in_view`.
    """
    if in_view is None or targets.shape[1:] != in_view.shape[1:] or len(in_view) not in (1, len(targets)):
        return  # the loss refuses labels of another shape
    wrong = targets.to(in_view.device) & in_view
    if not wrong.any():
        return
    row, column = wrong.nonzero()[0].tolist()
    found = f"Row {row} has a label on column {column + 1}, "
    start = None if input_ids is None else int(answer_start(config, input_ids)[row])
    if start is not None and column + 1 >= start:
        raise ValueError(f"{found}which its attention_mask lets column {column} see: hide it, or label it -100.")
    if start == len(in_view[row]):
        found += f"and has no <sop> (id {config.bos_token_id})"
    else:
        found += "before its first <sop>" + ("" if start is None else f" (column {start})")
    raise ValueError(
        f"{found}. What stands there is a prompt, whose tokens see each other, so a loss on them teaches nothing but "
        "to copy. Build rows with tokenizer.build_inputs_with_special_tokens(prompt_ids, answer_ids), or from "
        "messages with the chat template, and label the answer alone: -100 on the prompt."
    )


def warn_of_scores(
    config: ChatGLMConfig, in_view: torch.Tensor | None, kept: slice | torch.Tensor, in_training: bool
) -> None:
    """Say once that scores of the `kept` columns are of tokens in view, where a row is nothing but context.

    `in_view` [B, S]: see `next_in_view`. In training, scores of a prompt alone are of no use either.
    """
    last = 2 if in_training else 1
    if in_view is None or in_view.shape[1] <= last:
        return
    columns = torch.arange(in_view.shape[1], device=in_view.device)[kept]
    if in_view[:, :-last].all(dim=1).any() & (columns < in_view.shape[1] - 1).any():
        logger.warning_once(
            f"A row has no <sop> (id {config.bos_token_id}) before its end, so its tokens see each other. Scores of "
            "all its columns but the last are of tokens in view, and say nothing of how likely they are. Build rows "
            "with tokenizer.build_inputs_with_special_tokens(prompt_ids, answer_ids), or from messages with the chat "
            "template."
        )


def is_whole(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, cache: Cache | None) -> bool:
    """Whether these are sequences of several tokens from their start."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None or given.ndim < 2 or given.shape[1] < 2:
        return False
    return cache is None or int(cache.get_seq_length()) == 0


def with_checked_labels(forward: Callable, names: inspect.Signature) -> Callable:
    """A forward in the place of the model's own, whose signature is `names`, that checks labels first."""

    @functools.wraps(forward)
    def checked(self, *args, **kwargs):
        given = names.bind_partial(self, *args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        cache = given.get("past_key_values", given.get("cache"))
        has_labels = given.get("labels") is not None and not is_traced()
        if has_labels and is_whole(given.get("input_ids"), given.get("inputs_embeds"), cache):
            taken = ("labels", "input_ids", "position_ids", "attention_mask", *LOSS_ARGUMENTS)
            check_labels(self.config, **{name: given[name] for name in taken if name in given})
        return forward(self, *args, **kwargs)

    return checked
