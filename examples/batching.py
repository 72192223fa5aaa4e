"""Continuous batching: one ChatGLM model decodes many answers together, each with settings of its own.

Between two steps, answers that ended leave the batch and prompts that wait enter it. A prompt sees itself both ways, so
it is read in one piece; prompts that wait together are read together if they are of similar length.

The same seed gives the same answer as `torch.manual_seed(seed)` and `model.chat`: scores go through transformers' own
processors in the order of `generate`, and each row draws its random numbers from a generator of its own, as
`torch.multinomial` would. What remains is rounding: a matrix product of many rows may differ from that of one in the
last bits (1e-6 of the scores in fp32), which changes an answer only where two choices are as close as that.

Letters: B rows of the batch, H heads, T columns in use, C columns of the cache, D head width, V vocabulary.
"""

import argparse
import asyncio
import atexit
import collections
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
import torch
from cli_demo import positive, settled
from transformers import DynamicCache, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from chatglm_int8.cuda_graphs import StepGraph, can_record
from chatglm_int8.generation_chatglm import FiniteScores

logger = logging.getLogger("chatglm")

GREEDY_BELOW = 1e-5  # a temperature; dividing scores by much less overflows
FIRST_COLUMNS = 128  # of a cache that grows
GPU_COLUMNS = 32  # on a GPU, T and padded prompts are a multiple: some of its kernels are built for each new shape
PREFILL_TOKENS = 2048  # prompts read together have this many tokens at most, padding counted
PREFILL_WASTE = 1.5  # and this many times the tokens that they have without padding
GPU_PREFILL_TOKENS = 512  # or this many on a GPU, where reading fewer takes no less time
SMALL_MODEL = 1 << 28  # bytes of weights: on a CPU, threads would wait for each other longer than they compute
MAX_BATCH = 16  # answers decoded together, unless somebody says otherwise
SCORED_ROWS = 64  # tokens of a prompt whose scores, a vocabulary each, are in memory at a time
TIES = 64  # room for scores that equal the top_k-th, which are kept too; in half precision there are some


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a `Scheduler` is given for the memory there is: --max-batch and --max-length."""
    parser.add_argument("--max-batch", type=positive(int), default=MAX_BATCH, help="answers decoded together")
    parser.add_argument("--max-length", type=positive(int), help="tokens of prompt and answer (default: the model's)")


class Busy(Exception):
    """The queue is full: nothing was submitted."""


class TimeLimit(Exception):
    """The answer was not ready within the time limit."""


class Failed(Exception):
    """The answer can't be continued, through no fault of the request. The message is fit for clients."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen; the defaults are those of `model.chat`.

    Attributes:
        max_new_tokens: the longest sequence of the scheduler is a limit too. 0 reads the prompt only.
        min_new_tokens: the answer does not end before.
        temperature: 0 takes the likeliest token each time.
        top_p, top_k: as in `generate`; top_k 0 is none.
        seed: of this answer's random numbers; None takes another one every time.
        presence_penalty, frequency_penalty: subtracted from the score of each token that the answer has already, once
            and once for each time.
        top_logprobs: None, or report the log-probability of each token and of this many likeliest ones.
        prompt_logprobs: report the prompt's tokens too. Those behind its first `<sop>` have log-probabilities, if
            `top_logprobs` is given; the others see each other, so a score would not be a prediction.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 0.95
    top_p: float = 0.7
    top_k: int = 50
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int | None = None
    prompt_logprobs: bool = False

    @property
    def warpers(self) -> tuple[float, int, float] | None:
        """What rows must have in common to be sampled together; None for greedy ones."""
        return (self.temperature, self.top_k, self.top_p) if self.temperature >= GREEDY_BELOW else None


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of an answer. `logprob` and `top`, pairs of id and log-probability, if they were asked for.

    `text` is the token's part of the answer's text; see `TokenTexts`.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    text: str = ""


class Answer:
    """One answer in the making: iterate over it, in the event loop that submitted it, to get its `Token`s.

    To follow several at once, wait for the `arrival` of any and `take` from each. `<eop>` is not among the tokens. Both
    ways raise TimeLimit or Failed; in the end, `finish_reason` is "stop" (the model ended), "length" or "cancelled".
    Call `cancel` when nobody wants the rest: the answer leaves before the next step. `prompt_tokens` are there, if they
    were asked for, as soon as anything has arrived.
    """

    def __init__(self, prompt: list[int], sampling: Sampling, deadline: float):
        self.prompt = prompt
        self.sampling = sampling
        self.finish_reason: str | None = None
        self.prompt_tokens: list[Token] = []
        self._deadline = deadline
        self._cancelled = False
        self._loop = asyncio.get_running_loop()
        self._events: collections.deque[Token | Exception | str] = collections.deque()
        self._waiter: asyncio.Future | None = None  # of `arrival`
        # The scheduler's own:
        self._last = -1  # token to read next
        self._count = 0  # of tokens so far
        self._positions: list[int] = []  # of the last token read, one for each row of positions
        self._generator: torch.Generator | None = None
        self._seen: torch.Tensor | None = None  # how often each id stands in the answer, [V], if there are penalties

    def cancel(self) -> None:
        """Give up the rest; harmless at any time and from any thread."""
        self._cancelled = True

    def take(self) -> list[Token]:
        """The tokens that have come since the last call; raises what ended the answer, once there are none before it.

        `finish_reason` is set together with the last ones.
        """
        tokens = []
        while self._events and not (tokens and isinstance(self._events[0], Exception)):
            event = self._events.popleft()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, str):
                self.finish_reason = event
            else:
                tokens.append(event)
        return tokens

    async def __aiter__(self) -> AsyncIterator[Token]:
        while self.finish_reason is None:
            await arrival([self])
            for token in self.take():
                yield token


async def arrival(answers: list[Answer]) -> None:
    """Wait until `take` has something to give for one of the answers, which nobody else may be waiting for."""
    if any(answer._events for answer in answers):
        return
    waiter = asyncio.get_running_loop().create_future()
    for answer in answers:
        answer._waiter = waiter
    await waiter


class RowCache:
    """Keys and values of up to B answers, each in a row filled from column 0 to a length of its own.

    Keys carry their positions, so it does not matter in which column one stands: rows of all lengths are decoded
    together, a row enters by being copied in and leaves by the last one taking its place, and nothing else moves.
    `step` reads one token of each row. `ChatGLMModel.forward` takes this as its cache, with the mask of `mask`.
    """

    is_compileable = False

    def __init__(self, model, rows: int, columns: int):
        config = model.config
        self.prefix = config.pre_seq_len or 0
        self.lengths: list[int] = []
        self._limit = columns + self.prefix
        self._dtype = model.dtype
        devices = [block.attention.dense.weight.device for block in model.transformer.layers]
        head_dim = config.hidden_size // config.num_attention_heads
        on_cpu = all(device.type == "cpu" for device in devices)
        # Taken at once, a GPU's memory can't run out later. On a CPU it grows, as few answers are long.
        self.columns = min(self._limit, FIRST_COLUMNS) if on_cpu else self._limit
        self.unit = 1 if on_cpu else GPU_COLUMNS
        shape = (2, rows, config.num_attention_heads, self.columns, head_dim)
        self._stores = [_zeros(shape, self._dtype, device) for device in devices]
        self._places: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._graphs: dict[int, StepGraph] | None = {} if can_record(model) else None  # by the number of rows

    def append(self, prefilled, index: int, length: int) -> None:
        """Copy in sequence `index` of a `DynamicCache`, of which the last `length` columns are no padding."""
        row, end = len(self.lengths), self.prefix + length
        self._reserve(end)
        for store, layer in zip(self._stores, prefilled.layers, strict=True):
            for kind, states in enumerate((layer.keys[index], layer.values[index])):
                padding = states.shape[1] - end
                start = self.prefix if padding else 0
                if start:
                    store[kind, row, :, :start] = states[:, :start]
                store[kind, row, :, start:end] = states[:, padding + start :]
        self.lengths.append(end)

    def remove(self, row: int) -> None:
        """Take a row out; the last one takes its place. What they leave is zeroed, since NaN would outlast a mask."""
        last = len(self.lengths) - 1
        old, new = self.lengths[row], self.lengths[last]
        for store in self._stores:
            if row != last:  # whose columns after its own are zero
                store[:, row, :, : max(old, new)] = store[:, last, :, : max(old, new)]
            store[:, last, :, :new] = 0
        self.lengths[row] = new
        self.lengths.pop()

    def clear(self) -> None:
        while self.lengths:
            self.remove(len(self.lengths) - 1)

    @torch.no_grad()
    def step(self, model, ids: list[int], positions: list[list[int]]) -> torch.Tensor:
        """Scores [B, V] of the tokens that follow the rows' next ones, of which ids and positions, B of R, are given.

        On a GPU a step is recorded for each number of rows and replayed; its scores last until the next.
        """
        if self._graphs is None:
            device = model.get_input_embeddings().weight.device
            self.make_room()
            places = torch.tensor(positions, device=device)
            places = places[..., None] if model.config.position_encoding_2d else places
            mask = self.mask(device)
            return model(torch.tensor(ids, device=device)[:, None], places, mask, self, use_cache=True).logits[:, -1]
        rows = len(self.lengths)
        graph = self._graphs.get(rows)
        if graph is None:
            graph = self._graphs[rows] = StepGraph(model, rows)
            graph.buffers = [(store[0, :rows], store[1, :rows]) for store in self._stores]
        given = torch.tensor([ids, self.lengths, *zip(*positions, strict=True)]).to(graph.ids.device)
        graph.ids.copy_(given[0])
        graph.slots.copy_(given[1])
        graph.positions.copy_(given[2:].T)
        self.lengths = [length + 1 for length in self.lengths]
        return graph.replay(model)[:, -1]

    def make_room(self) -> None:
        """One more column for every row: the next `update` fills it."""
        self._reserve(max(self.lengths) + 1)
        self._places = {}
        for store in self._stores:
            if store.device not in self._places:
                rows = torch.arange(len(self.lengths), device=store.device)
                self._places[store.device] = rows, torch.tensor(self.lengths, device=store.device)
        self.lengths = [length + 1 for length in self.lengths]

    def _reserve(self, columns: int) -> None:
        if columns <= self.columns:
            return
        self.columns = min(self._limit, max(columns, 2 * self.columns))
        for index, old in enumerate(self._stores):
            store = _zeros((*old.shape[:3], self.columns, old.shape[4]), old.dtype, old.device)
            rows = len(self.lengths)
            store[:, :rows, :, : old.shape[3]] = old[:, :rows]
            self._stores[index] = store

    def _used(self) -> int:
        """T."""
        return min(self.columns, _rounded_up(max(self.lengths), self.unit))

    def mask(self, device: torch.device) -> torch.Tensor:
        """What is added to the scores, [B, 1, 1, T]: 0 for a row's own columns, else the dtype's lowest number."""
        lengths = torch.tensor(self.lengths, device=device)
        hidden = torch.arange(self._used(), device=device) >= lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=device)
        return mask.masked_fill_(hidden, torch.finfo(self._dtype).min)[:, None, None]

    # What the model calls

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths, default=0)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, cache_kwargs: dict | None = None):
        """Put in keys and values [B, H, 1, D] of a step; returns all of them, [B, H, T, D]."""
        store = self._stores[layer_idx]
        rows, columns = self._places[store.device]
        store[0][rows, :, columns] = key[:, :, 0]
        store[1][rows, :, columns] = value[:, :, 0]
        kept = store[:, : len(rows), :, : self._used()]
        return kept[0], kept[1]


class Scheduler:
    """Decodes the answers of one model in a thread of its own.

    Args:
        model, tokenizer: as loaded; nothing else may run the model meanwhile.
        max_batch: answers decoded together. Their keys and values need `max_batch` times `max_length` columns, 0.94 GB
            for each answer of 2048 tokens of ChatGLM-6B in fp16: on a GPU at once, on a CPU as answers grow.
        max_queue: answers that wait beside them.
        max_length: tokens of prompt and answer together; by default and at most the model's longest sequence.
        time_limit: seconds from being submitted to the last token.

    Raises:
        ValueError: the cache does not fit into memory.
    """

    def __init__(
        self,
        model,
        tokenizer,
        max_batch: int = MAX_BATCH,
        max_queue: int = 64,
        max_length: int | None = None,
        time_limit: float = 300.0,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.max_length = min(max_length or model.config.max_sequence_length, model.config.max_sequence_length)
        self.time_limit = time_limit
        try:
            self._cache = RowCache(model, max_batch, self.max_length)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ValueError(
                f"Keys and values of {max_batch} answers of {self.max_length} tokens do not fit into memory: "
                "lower --max-batch or --max-length."
            ) from error
        self._device = model.get_input_embeddings().weight.device
        self._free_tokens = 0 if self._device.type == "cpu" else GPU_PREFILL_TOKENS
        self._finite = FiniteScores()
        self._rows: list[Answer] = []
        self._waiting: collections.deque[Answer] = collections.deque()
        self._outbox: dict[asyncio.AbstractEventLoop, list] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._failures = 0  # in a row
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()
        # A thread that computes while the interpreter shuts down can abort the process.
        atexit.register(self.close)

    # For the event loops

    @property
    def running(self) -> int:
        """Answers in the batch."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Answers in the queue."""
        return len(self._waiting)

    @property
    def healthy(self) -> bool:
        """Whether steps work; a GPU that is lost fails every one."""
        return self._thread.is_alive() and self._failures < 3

    def room(self, prompt: list[int]) -> int:
        """How many tokens an answer to this prompt may have; less than 1 if the prompt is too long."""
        return self.max_length - len(prompt)

    def submit(self, prompt: list[int], samplings: list[Sampling]) -> list[Answer]:
        """Queue an answer to the prompt for each of `samplings`, or none; call it in a running event loop.

        Raises:
            Busy: not all of them have room in the queue.
            Failed: the scheduler was closed.
            ValueError: a prompt without room for an answer.
        """
        if self.room(prompt) < 1:
            raise ValueError(f"The prompt has {len(prompt)} tokens, with a limit of {self.max_length} with the answer.")
        deadline = time.monotonic() + self.time_limit
        answers = [Answer(prompt, sampling, deadline) for sampling in samplings]
        with self._changed:
            if self._closing:
                raise Failed("The server is shutting down.")
            places = self.max_queue + self.max_batch - len(self._rows)
            if len(self._waiting) + len(answers) > places:
                raise Busy
            self._waiting.extend(answers)
            self._changed.notify()
        return answers

    def close(self) -> None:
        """End the thread; answers that are not ready fail."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        atexit.unregister(self.close)

    # In the thread

    def _run(self) -> None:
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        if self._device.type == "cpu" and weights < SMALL_MODEL:
            torch.set_num_threads(1)
        while True:
            with self._changed:
                while not (self._waiting or self._rows or self._closing):
                    self._changed.wait()
            if self._closing:
                break
            try:
                self._drop()
                self._admit()
                if self._rows:
                    self._step()
                    self._failures = 0
            except Exception as error:
                logger.exception("A decoding step failed")
                self._failures += 1
                self._fail(self._rows, error)
                self._rows = []
                with contextlib.suppress(Exception):  # a lost GPU; the next steps will tell
                    self._cache.clear()
            self._flush()
        self._fail([*self._rows, *self._waiting], Failed("The server is shutting down."))
        self._flush()

    def _send(self, answer: Answer, event: Token | Exception | str) -> None:
        self._outbox.setdefault(answer._loop, []).append((answer, event))

    def _flush(self) -> None:
        """Hand all events to the event loops, waking each up once."""
        outbox, self._outbox = self._outbox, {}
        for loop, events in outbox.items():
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(_deliver, events)

    def _fail(self, answers: list[Answer], error: Exception) -> None:
        if not isinstance(error, (TimeLimit, Failed)):
            short = isinstance(error, torch.OutOfMemoryError)
            error = Failed("The server ran out of memory." if short else "The server failed to compute an answer.")
        for answer in answers:
            self._send(answer, error)

    def _drop(self) -> None:
        """Let go of answers that nobody waits for any more, or that took too long."""
        now = time.monotonic()

        def drops(answer: Answer) -> bool:
            if answer._cancelled:
                self._send(answer, "cancelled")
            elif now > answer._deadline:
                self._fail([answer], TimeLimit(f"The answer was not ready within {self.time_limit:g} seconds."))
            return answer._cancelled or now > answer._deadline

        for row in reversed(range(len(self._rows))):
            if drops(self._rows[row]):
                self._leave(row)
        with self._changed:
            for answer in [answer for answer in self._waiting if drops(answer)]:
                self._waiting.remove(answer)

    def _leave(self, row: int) -> None:
        self._cache.remove(row)
        self._rows[row] = self._rows[-1]
        self._rows.pop()

    def _admit(self) -> None:
        """Read the prompt that has waited longest, with those that go with it, and choose their first tokens."""
        with self._changed:
            group = _prefill_group(self._waiting, self.max_batch - len(self._rows), self._free_tokens)
            for answer in group:
                self._waiting.remove(answer)
        if not group:
            return
        try:
            with torch.no_grad():
                self._prefill(group)
        except Exception as error:
            logger.exception("Reading a prompt failed")
            self._failures += not isinstance(error, torch.OutOfMemoryError)  # a shorter one may do
            group = [answer for answer in group if answer not in self._rows]
            self._fail(group, error)

    def _prefill(self, group: list[Answer]) -> None:
        longest = _rounded_up(max(len(answer.prompt) for answer in group), self._cache.unit)
        pad = self.model.config.pad_token_id or 0
        ids = torch.tensor([[pad] * (longest - len(a.prompt)) + a.prompt for a in group], device=self._device)
        real = torch.tensor([[0] * (longest - len(a.prompt)) + [1] * len(a.prompt) for a in group], device=self._device)
        positions = self.model.get_position_ids(ids, attention_mask=real)
        prefilled = DynamicCache(config=self.model.config)
        hidden = self.model.transformer(ids, positions, real, prefilled, use_cache=True).last_hidden_state
        logits = self.model.score(hidden[:, -1:])[:, 0]
        last = positions.view(len(group), -1, longest)[..., -1].tolist()
        for answer, position, states in zip(group, last, hidden, strict=True):
            sampling = answer.sampling
            answer._positions = position
            answer._generator = torch.Generator(logits.device)
            answer._generator.seed() if sampling.seed is None else answer._generator.manual_seed(sampling.seed)
            if sampling.presence_penalty or sampling.frequency_penalty:
                answer._seen = torch.zeros(logits.shape[-1], device=logits.device)
            if sampling.prompt_logprobs:
                answer.prompt_tokens = self._score_prompt(answer, states[longest - len(answer.prompt) :])
        ended = self._choose(group, logits)
        for index, answer in enumerate(group):
            if not ended[index]:
                self._cache.append(prefilled, index, len(answer.prompt))
                self._rows.append(answer)

    def _score_prompt(self, answer: Answer, hidden: torch.Tensor) -> list[Token]:
        """The tokens of a prompt with hidden states [S, hidden]: those behind `<sop>` with log-probabilities."""
        prompt, count, bos = answer.prompt, answer.sampling.top_logprobs, self.model.config.bos_token_id
        start = prompt.index(bos) + 1 if bos in prompt and count is not None else len(prompt)
        tokens = [Token(token_id) for token_id in prompt[:start]]
        for first in range(start, len(prompt), SCORED_ROWS):
            ids = torch.tensor(prompt[first : first + SCORED_ROWS], device=hidden.device)
            # Each token is predicted by the one before it.
            scores = self._scores(self.model.score(hidden[None, first - 1 : first - 1 + len(ids)])[0])
            tokens += _with_logprobs(scores, ids, [count] * len(ids))
        return tokens

    def _step(self) -> None:
        """Read the last token of every row and choose the next."""
        for answer in self._rows:
            answer._positions[-1] += 1
        ids, positions = [answer._last for answer in self._rows], [answer._positions for answer in self._rows]
        ended = self._choose(self._rows, self._cache.step(self.model, ids, positions))
        for row in reversed(range(len(self._rows))):
            if ended[row]:
                self._leave(row)

    def _choose(self, answers: list[Answer], logits: torch.Tensor) -> list[bool]:
        """Choose and send a token for each answer from its scores [B, V]; returns which have ended with it."""
        raw = scores = self._scores(logits)
        eos = self.model.config.eos_token_id
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
            tokens[places] = _draw(scores[places], noise, *warpers)

        reports = self._logprobs(answers, raw, tokens)
        ended = []
        for row, token in enumerate(tokens.tolist()):
            answer = answers[row]
            if answer.sampling.max_new_tokens == 0:
                self._send(answer, "length")
                ended.append(True)
                continue
            if token == eos:
                self._send(answer, "stop")
                ended.append(True)
                continue
            self._send(answer, reports.get(row) or Token(token))
            answer._last = token
            answer._count += 1
            if answer._seen is not None:
                answer._seen[token] += 1
            full = answer._count >= min(answer.sampling.max_new_tokens, self.room(answer.prompt))
            if full:
                self._send(answer, "length")
            ended.append(full)
        return ended

    def _logprobs(self, answers: list[Answer], scores: torch.Tensor, tokens: torch.Tensor) -> dict[int, Token]:
        """The chosen tokens of the rows that want log-probabilities: those of the scores as the model gives them."""
        rows = [row for row, answer in enumerate(answers) if answer.sampling.top_logprobs is not None]
        if not rows:
            return {}
        counts = [answers[row].sampling.top_logprobs for row in rows]
        return dict(zip(rows, _with_logprobs(scores[rows], tokens[rows], counts), strict=True))

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores float32 [B, V] of logits: finite, and minus infinity for the spare rows of the embedding."""
        scores = self._finite(None, logits.float())
        scores[:, len(self.tokenizer) :] = -torch.inf
        return scores


def _with_logprobs(scores: torch.Tensor, ids: torch.Tensor, counts: list[int]) -> list[Token]:
    """Tokens `ids` [N] with their log-probabilities and those of the `counts` [N] likeliest, from scores [N, V]."""
    logprobs = scores.log_softmax(dim=-1)
    own = logprobs.gather(1, ids[:, None]).flatten().tolist()
    values, likeliest = logprobs.topk(min(max(counts), logprobs.shape[-1]), dim=-1)
    pairs = [tuple(zip(*both, strict=True)) for both in zip(likeliest.tolist(), values.tolist(), strict=True)]
    return [
        Token(token_id, logprob, top[:count])
        for token_id, logprob, top, count in zip(ids.tolist(), own, pairs, counts, strict=True)
    ]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, which a mask can hide; what happens to be in memory may be NaN, which it can't."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's take memory when they are written to, and rows that are not used never are.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _deliver(events: list[tuple[Answer, Token | Exception | str]]) -> None:
    for answer, event in events:
        answer._events.append(event)
        if answer._waiter is not None and not answer._waiter.done():
            answer._waiter.set_result(None)


def _prefill_group(waiting: collections.deque[Answer], rows: int, free: int = 0) -> list[Answer]:
    """The first that waits, and up to `rows` - 1 others that can be padded to the same length at little cost.

    As long as there are no more than `free` tokens, padding costs nothing.
    """
    group: list[Answer] = []
    longest = real = 0
    for answer in waiting:
        if len(group) >= rows:
            break
        length = max(longest, len(answer.prompt))
        padded = length * (len(group) + 1)
        if group and padded > min(PREFILL_TOKENS, max(free, PREFILL_WASTE * (real + len(answer.prompt)))):
            continue
        group.append(answer)
        longest, real = length, real + len(answer.prompt)
    return group


def _draw(scores: torch.Tensor, noise: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
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


class AnswerText:
    """Text of an answer, piece by piece, up to the stop string that is complete first.

    The pieces of all steps and of `finish`, joined, are what the whole answer would have given: text that a later token
    may change, or that may be the beginning of a stop string, appears once that is decided.

    Args:
        tokenizer: whose ids they are.
        process: `model.process_response` for an answer in a chat, or None for text as it is.
        stop: strings that end the text and are not part of it.
        begun: ids of the answer that the prompt has already; their text is not given again.

    Attributes:
        stopped: a stop string was found.
        length: of the text that the ids so far stand for, whether it is certain or not.
    """

    def __init__(
        self,
        tokenizer,
        process: Callable[[str], str] | None = None,
        stop: list[str] | None = None,
        begun: Sequence[int] = (),
    ):
        self.stopped = False
        self._decoder = tokenizer.decode_stream()
        self._process = process
        self._stop = stop or []
        self._raw = "".join([self._decoder.step(token_id) for token_id in begun])
        self._shown = self.length = len(self._raw)

    def step(self, token_id: int) -> str:
        """Takes the next id and returns the text that is certain now. Once `stopped`, there is no more."""
        self._raw += self._decoder.step(token_id)
        return self._advance(last=False)

    def finish(self) -> str:
        """Returns what was kept back, at the end of the answer."""
        self._raw += self._decoder.flush()
        return self._advance(last=True)

    def _advance(self, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._raw
        if self._process is not None:
            space = text[len(text.rstrip()) :]
            text = self._process(text)
            self.length = len(text)
            text = text and text + space  # stripped by process_response, but a stop string may be in it
            if not last:
                text = settled(text)
        else:
            self.length = len(text)
        found = [(text.find(stop, self._shown), len(stop)) for stop in self._stop]
        # The one that is complete first, however the text is cut into tokens.
        stops = [(place + length, place) for place, length in found if place >= 0]
        self.stopped = bool(stops)
        end = min(stops)[1] if stops else len(text)
        if not last and not stops:
            end -= max((_overlap(text[self._shown :], stop) for stop in self._stop), default=0)
        if self._process is not None:
            end = len(text[:end].rstrip())
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece


class TokenTexts:
    """The part of an answer's text that each token adds. Joined, the parts are the text.

    A token is given out once the text up to its end is certain and another token has come: the last one takes what is
    left of the text. A token that completes no character has no text.
    """

    def __init__(self, begun: int):
        """`begun`: length of the text before the first token."""
        self._tokens: collections.deque[tuple[Token, int]] = collections.deque()  # each with the length up to its end
        self._text = ""  # what is certain and not given out
        self._given = begun

    def add(self, token: Token, text: str, length: int) -> None:
        """A token, the text that has become certain with it, and the `length` of its `AnswerText`."""
        self._text += text
        self._tokens.append((token, length))

    def take(self) -> list[Token]:
        """The tokens with certain text, since the last call."""
        taken = []
        while len(self._tokens) > 1 and self._tokens[0][1] <= self._given + len(self._text):
            token, length = self._tokens.popleft()
            taken.append(self._cut(token, max(length - self._given, 0)))
        return taken

    def finish(self, text: str) -> list[Token]:
        """All other tokens, given the end of the text; it belongs to the last one."""
        self._text += text
        taken = [self._cut(token, max(length - self._given, 0)) for token, length in self._tokens]
        if taken:
            taken[-1] = dataclasses.replace(taken[-1], text=taken[-1].text + self._text)
        self._tokens.clear()
        return taken

    def _cut(self, token: Token, size: int) -> Token:
        text, self._text = self._text[:size], self._text[size:]
        self._given += len(text)
        return dataclasses.replace(token, text=text)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
