"""Conversations as token ids, and batches of them."""

import os
import sys
from collections.abc import Callable

import torch
from tqdm import tqdm

from ... import ChatGLMTokenizer
from .dialogues import Conversations, read_rows
from .settings import Settings

FIRST_ROUNDS = 8  # that are encoded at once; more are added while they fit


def read_examples(path: str, tokenizer: ChatGLMTokenizer, settings: Settings, quiet: bool = False) -> list[dict]:
    """The dialogues of a file as ids `prompt [gMASK] <sop> answer <eop>`.

    Of dialogues with more than `max_length` tokens the oldest rounds are left out, as `model.chat` does; those whose
    last round alone is longer are left out altogether. How many, and which columns are not read, is printed, unless
    `quiet`.

    Returns:
        `input_ids`, and as text the last question, `prompt`, and its answer, `response`, of each example.

    Raises:
        OSError: no such file.
        ValueError: a bad line, or nothing left to learn.
    """
    examples, shortened, left_out = [], [], []
    conversations = Conversations(settings)
    for place, row in tqdm(read_rows(path), desc=f"reading {os.path.basename(path)}", disable=quiet or None):
        for messages in conversations.of(place, row):
            ids, complete = _encode(place, messages, tokenizer, settings)
            if len(ids) > settings.max_length:
                left_out.append(place)
                continue
            if not complete:
                shortened.append(place)
            examples.append({"input_ids": ids, "prompt": messages[-2]["content"], "response": messages[-1]["content"]})
    if not examples:
        raise ValueError(
            f"{path} has no dialogue of at most --max-length = {settings.max_length} tokens, of {len(left_out)}."
        )
    if not quiet:
        print(f"{path}: {len(examples)} dialogues, {sum(len(example['input_ids']) for example in examples)} tokens")
        for places, fate in ((shortened, "were cut to their last rounds"), (left_out, "were left out")):
            if places:
                print(
                    f"{path}: {len(places)} with more than --max-length = {settings.max_length} tokens {fate}, "
                    f"the first: {places[0]}"
                )
    if conversations.unused and not quiet:
        names = ", ".join(f"{name!r} ({count} times)" for name, count in sorted(conversations.unused.items()))
        print(
            f"{path}: WARNING: what these columns hold is not learnt: {names}. --prompt-column, --input-column, "
            "--system-column, --history-column, --response-column and --messages-column say which are.",
            file=sys.stderr,
        )
    return examples


def _encode(
    place: str, messages: list[dict], tokenizer: ChatGLMTokenizer, settings: Settings
) -> tuple[list[int], bool]:
    """Ids with as many of the last rounds as fit into `max_length`, at least one; whether these are all."""
    first = 1 if messages[0]["role"] == "system" else 0
    head, body = messages[:first], messages[first:]
    asks = [message["role"] == "user" for message in body]
    starts = [0, *(i for i in range(1, len(body)) if asks[i] and not asks[i - 1])]  # of the rounds

    def encode(rounds: int) -> list[int]:
        return tokenizer.apply_chat_template(head + body[starts[-rounds] :], return_dict=False)

    try:
        rounds, ids = most_rounds(encode, len(starts), settings.max_length)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    start = ids.index(tokenizer.bos_token_id)
    for name, count in ((settings.prompt_column, start - 1), (settings.response_column, len(ids) - start - 2)):
        if count < 1:
            raise ValueError(f"{place}: the column {name!r} has no text that gives tokens.")
    return ids, rounds == len(starts)


def most_rounds(encode: Callable[[int], list[int]], available: int, limit: int) -> tuple[int, list[int]]:
    """The most of a dialogue's last rounds whose ids are within a limit, or one, and those ids.

    Doubles, then halves: the ids that are made in all are a small multiple of the limit, however long the dialogue.
    """
    rounds = min(FIRST_ROUNDS, available)
    ids, fitting, too_many = encode(rounds), (0, []), available + 1
    while True:
        if len(ids) <= limit:
            fitting = rounds, ids
        else:
            too_many = rounds
        if too_many == 1:
            return 1, ids
        if too_many - fitting[0] == 1:
            return fitting
        rounds = min(2 * rounds, available) if too_many > available else (fitting[0] + too_many) // 2
        ids = encode(rounds)


class Collator:
    """Examples → int64 `input_ids`, `attention_mask`, `labels`, each [B, S], padded on the left."""

    def __init__(self, tokenizer: ChatGLMTokenizer):
        self.tokenizer = tokenizer

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        ids = [example["input_ids"] for example in examples]
        batch = self.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        # The loss is on what follows <sop>, which no text of a dialogue can contain.
        starts = batch["input_ids"] == self.tokenizer.bos_token_id
        is_answer = (starts.cumsum(dim=1) > 0) & ~starts
        return {**batch, "labels": batch["input_ids"].where(is_answer, -100)}
