"""Continuous batching: one ChatGLM model decodes many answers together, each with settings of its own.

Between two steps, answers that ended leave the batch and prompts that wait enter it. A prompt sees itself both ways, so
it is read in one piece; prompts that wait together are read together if they are of similar length.

The same seed gives the same answer as `torch.manual_seed(seed)` and `model.chat`: scores go through transformers' own
processors in the order of `generate`, and each row draws its random numbers from a generator of its own, as
`torch.multinomial` would. What remains is rounding: a matrix product of many rows may differ from that of one in the
last bits (1e-6 of the scores in fp32), which changes an answer only where two choices are equally close.

Letters: B rows of the batch, S tokens of a prompt, V vocabulary.
"""

import asyncio
import atexit
import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache

from .answers import Answer, Busy, Failed, Sampling, TimeLimit, Token, deliver
from .cache_rows import RowCache, rounded_up
from .sampling import choose, report, with_logprobs
from .settings import MAX_BATCH

logger = logging.getLogger("chatglm")

PREFILL_TOKENS = 2048  # prompts read together have this many tokens at most, padding counted
PREFILL_WASTE = 1.5  # and this many times the tokens that they have without padding
GPU_PREFILL_TOKENS = 512  # or this many on a GPU, where reading fewer takes no less time
SMALL_MODEL = 1 << 28  # bytes of weights: on a CPU, threads would wait for each other longer than they compute
GRACE = 5.0  # seconds beyond the time limit after which a thread that hangs is not waited for
NOT_FINITE = "The model's scores are NaN or infinite here, so there is no answer; the weights may be damaged."
BROKEN = -1  # in the place of a token: the row's scores are not finite
SCORED_ROWS = 64  # tokens of a prompt scored at a time: the scores of each are a row of the whole vocabulary


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
        self._rows: list[Answer] = []
        self._reading: list[Answer] = []  # those with a prompt under way
        self._waiting: collections.deque[Answer] = collections.deque()
        self._outbox: dict[asyncio.AbstractEventLoop, list] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._ending = "The server is shutting down."  # what clients are told then
        self._failures = 0  # in a row
        self._began: float | None = None  # when the step under way began
        self.on_step: Callable[[int, float], None] = lambda rows, seconds: None  # called after each, in the thread
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
    def places(self) -> int:
        """How many more answers may be submitted."""
        return self.max_queue + self.max_batch - len(self._rows) - len(self._waiting)

    @property
    def closing(self) -> bool:
        """Whether nothing is taken any more."""
        return self._closing

    @property
    def healthy(self) -> bool:
        """Whether steps work and end in time; a GPU that is lost fails every one."""
        began = self._began
        hangs = began is not None and time.monotonic() - began > self.time_limit + GRACE
        return self._thread.is_alive() and self._failures < 3 and not hangs

    def room(self, prompt: list[int]) -> int:
        """How many tokens an answer to this prompt may have; less than 1 if the prompt is too long."""
        return self.max_length - len(prompt)

    def submit(self, prompt: list[int], samplings: list[Sampling], since: float | None = None) -> list[Answer]:
        """Queue an answer to the prompt for each of `samplings`, or none; call it in a running event loop.

        The time limit counts from `since` (of `time.monotonic()`), by default from now.

        Raises:
            Busy: not all of them have room in the queue.
            Failed: the scheduler was closed, or its thread has ended.
            ValueError: a prompt without room for an answer.
        """
        if self.room(prompt) < 1:
            raise ValueError(f"The prompt has {len(prompt)} tokens, with a limit of {self.max_length} with the answer.")
        deadline = (time.monotonic() if since is None else since) + self.time_limit
        with self._changed:
            if self._closing:
                raise Failed(self._ending)
            if len(samplings) > self.places:
                raise Busy
            answers = [Answer(prompt, sampling, deadline) for sampling in samplings]
            self._waiting.extend(answers)
            self._changed.notify()
        for answer in answers:  # the thread keeps the limit itself, unless a step hangs
            answer.expire_at(deadline + GRACE, self._late())
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
        """Whatever ends the thread, all clients are told."""
        try:
            self._work()
        except BaseException:
            logger.exception("The scheduler has ended")
            self._ending = "The model does not compute any more: the server has to be restarted."
        with self._changed:
            self._closing = True
            self._fail([*self._rows, *self._reading, *self._waiting], Failed(self._ending))
            self._rows = []
            self._waiting.clear()
        self._flush()

    def _work(self) -> None:
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        if self._device.type == "cpu" and weights < SMALL_MODEL:
            torch.set_num_threads(1)
        while True:
            with self._changed:
                while not (self._waiting or self._rows or self._closing):
                    self._changed.wait()
            if self._closing:
                return
            self._began = time.monotonic()
            try:
                self._drop()
                self._admit()
                if self._rows:
                    rows = len(self._rows)
                    self._step()
                    self._failures = 0
                    self.on_step(rows, time.monotonic() - self._began)
            except Exception as error:
                logger.exception("A decoding step failed")
                self._failures += 1
                self._fail(self._rows, error)
                self._rows = []
                with contextlib.suppress(Exception):  # a lost GPU; the next steps will tell
                    self._cache.clear()
            self._began = None
            self._flush()

    def _send(self, answer: Answer, event: Token | Exception | str) -> None:
        self._outbox.setdefault(answer._loop, []).append((answer, event))

    def _flush(self) -> None:
        """Hand all events to the event loops, waking each up once."""
        outbox, self._outbox = self._outbox, {}
        for loop, events in outbox.items():
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(deliver, events)

    def _fail(self, answers: list[Answer], error: Exception) -> None:
        if not isinstance(error, (TimeLimit, Failed)):
            short = is_memory(error)
            error = Failed("The server ran out of memory." if short else "The server failed to compute an answer.")
        for answer in answers:
            self._send(answer, error)

    def _drop(self) -> None:
        """Drop answers that were cancelled or took too long."""
        now = time.monotonic()

        def drops(answer: Answer) -> bool:
            if answer._cancelled:
                self._send(answer, "cancelled")
            elif now > answer._deadline:
                self._fail([answer], self._late())
            return answer._cancelled or now > answer._deadline

        for row in reversed(range(len(self._rows))):
            if drops(self._rows[row]):
                self._leave(row)
        with self._changed:
            for answer in [answer for answer in self._waiting if drops(answer)]:
                self._waiting.remove(answer)

    def _late(self) -> TimeLimit:
        return TimeLimit(f"The answer was not ready within {self.time_limit:g} seconds.")

    def _leave(self, row: int) -> None:
        self._cache.remove(row)
        self._rows[row] = self._rows[-1]
        self._rows.pop()

    def _admit(self) -> None:
        """Read the prompt that has waited longest, with those that go with it, and choose their first tokens."""
        with self._changed:
            group = prefill_group(self._waiting, self.max_batch - len(self._rows), self._free_tokens)
            for answer in group:
                self._waiting.remove(answer)
            self._reading = group
        if not group:
            return
        for answer in group:
            answer.began = time.monotonic()
        try:
            with torch.no_grad():
                self._prefill(group)
        except Exception as error:
            logger.exception("Reading a prompt failed")
            self._failures += not is_memory(error)  # a shorter one may do
            self._fail([answer for answer in group if answer not in self._rows], error)
        self._reading = []

    def _prefill(self, group: list[Answer]) -> None:
        longest = rounded_up(max(len(answer.prompt) for answer in group), self._cache.unit)
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
                try:
                    answer.prompt_tokens = self._score_prompt(answer, states[longest - len(answer.prompt) :])
                except Failed as error:
                    self._send(answer, error)
                    answer.cancel()
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
            if not scores.amax(dim=-1).isfinite().all():
                raise Failed(NOT_FINITE)
            tokens += with_logprobs(scores, ids, [count] * len(ids))
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
        scores = self._scores(logits)
        eos = self.model.config.eos_token_id
        tokens = choose(answers, scores, eos)
        reports = report(answers, scores, tokens)
        tokens.masked_fill_(~scores.amax(dim=-1).isfinite(), BROKEN)  # a NaN is the largest of all
        ended = []
        for row, token in enumerate(tokens.tolist()):
            answer = answers[row]
            if token == BROKEN:
                self._send(answer, Failed(NOT_FINITE))
                ended.append(True)
                continue
            if answer.sampling.max_new_tokens == 0:
                self._send(answer, "length")
                ended.append(True)
                continue
            if token == eos:
                if answer.sampling.prompt_logprobs and row in reports:
                    self._send(answer, reports[row])
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

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores float32 [B, V] of logits: minus infinity for the spare rows of the embedding."""
        scores = logits.float()
        scores[:, len(self.tokenizer) :] = -torch.inf
        return scores


def is_memory(error: Exception) -> bool:
    """Whether memory was short. PyTorch has no class of its own for that on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def prefill_group(waiting: collections.deque[Answer], rows: int, free: int = 0) -> list[Answer]:
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
