"""Tokens drawn from scores, each row by random numbers of its own, and their log-probabilities."""

import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .answers import Answer, Token

TIES = 64  # room for scores that equal the top_k-th, which are kept too; in half precision there are some


def choose(answers: list[Answer], scores: torch.Tensor, eos: int) -> torch.Tensor:
    """A token for each answer, int64 [B], from its scores [B, V], which are left as they are."""
    short = [row for row, answer in enumerate(answers) if answer._count < answer.sampling.min_new_tokens]
    penalised = [row for row, answer in enumerate(answers) if answer._seen is not None]
    if short or penalised:
        scores = scores.clone()
    for row in penalised:
        scores[row] -= answers[row].sampling.frequency_penalty * answers[row]._seen
        scores[row] -= answers[row].sampling.presence_penalty * (answers[row]._seen > 0)
    if short:
        scores[short, eos] = -torch.inf
    groups: dict[tuple | None, list[int]] = {}
    for row, answer in enumerate(answers):
        groups.setdefault(answer.sampling.warpers, []).append(row)
    tokens = torch.empty(len(answers), dtype=torch.int64, device=scores.device)
    for warpers, rows in groups.items():
        places = rows if len(groups) > 1 else slice(None)  # a list would be copied to the device
        if warpers is None:
            tokens[places] = scores[places].argmax(dim=-1)
            continue
        noise = torch.empty_like(scores[: len(rows)])
        for place, row in zip(noise, rows, strict=True):
            place.exponential_(generator=answers[row]._generator)
        tokens[places] = draw(scores[places], noise, *warpers)
    return tokens


def draw(scores: torch.Tensor, noise: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Ids [B] drawn from scores [B, V], warped as `generate` does it.

    `noise` [B, V] is exponentially distributed: torch.multinomial draws one such number for each probability, too, and
    takes the largest ratio. So done, rows with generators of their own still make one kernel.
    """
    ids = None
    if 0 < top_k < scores.shape[-1] - TIES:
        # The rest has no probability, and to sort all of a large vocabulary for top_p takes long.
        scores, ids = scores.topk(top_k + TIES, dim=-1)
        noise = noise.gather(1, ids)
    if temperature != 1:
        scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    chosen = (scores.softmax(dim=-1) / noise).argmax(dim=-1)
    return chosen if ids is None else ids.gather(1, chosen[:, None]).squeeze(1)


def report(answers: list[Answer], scores: torch.Tensor, tokens: torch.Tensor) -> dict[int, Token]:
    """The chosen tokens [B] of the rows that want log-probabilities: those of the model's own scores [B, V]."""
    rows = [row for row, answer in enumerate(answers) if answer.sampling.top_logprobs is not None]
    if not rows:
        return {}
    counts = [answers[row].sampling.top_logprobs for row in rows]
    return dict(zip(rows, with_logprobs(scores[rows], tokens[rows], counts), strict=True))


def with_logprobs(scores: torch.Tensor, ids: torch.Tensor, counts: list[int]) -> list[Token]:
    """Tokens `ids` [N] with their log-probabilities and those of the `counts` [N] likeliest, from scores [N, V]."""
    logprobs = scores.log_softmax(dim=-1)
    own = logprobs.gather(1, ids[:, None]).flatten().tolist()
    values, likeliest = logprobs.topk(min(max(counts), logprobs.shape[-1]), dim=-1)
    pairs = [tuple(zip(*both, strict=True)) for both in zip(likeliest.tolist(), values.tolist(), strict=True)]
    return [
        Token(token_id, logprob, top[:count])
        for token_id, logprob, top, count in zip(ids.tolist(), own, pairs, counts, strict=True)
    ]
