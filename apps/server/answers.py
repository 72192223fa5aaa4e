"""An answer on its way from the scheduler's thread to an event loop."""

import asyncio
import collections
import dataclasses
import time
from collections.abc import AsyncIterator

import torch

GREEDY_BELOW = 1e-5  # a temperature; dividing scores by much less overflows


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
        prompt_logprobs: report the prompt's tokens and `<eop>`, too. If `top_logprobs` is given, those behind the first
            `<sop>` have log-probabilities; the others see each other, so a score would not be a prediction.
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

    To follow several at once, wait for the `arrival` of any and `take` from each. `<eop>` is not among the tokens,
    but for `prompt_logprobs`. Both ways raise TimeLimit or Failed; in the end, `finish_reason` is "stop" (the model
    ended), "length" or "cancelled". Call `cancel` when the rest is not wanted: the answer leaves before the next step.
    `prompt_tokens` are there, if they were asked for, as soon as anything has arrived.
    """

    def __init__(self, prompt: list[int], sampling: Sampling, deadline: float):
        self.prompt = prompt
        self.sampling = sampling
        self.finish_reason: str | None = None
        self.prompt_tokens: list[Token] = []
        self.submitted = time.monotonic()
        self.began: float | None = None  # when its prompt was read
        self._deadline = deadline
        self._cancelled = False
        self._loop = asyncio.get_running_loop()
        self._events: collections.deque[Token | Exception | str] = collections.deque()
        self._waiter: asyncio.Future | None = None  # of `arrival`
        self._timer: asyncio.TimerHandle | None = None
        # The scheduler's own:
        self._last = -1  # token to read next
        self._count = 0  # of tokens so far
        self._positions: list[int] = []  # of the last token read, one for each row of positions
        self._generator: torch.Generator | None = None
        self._seen: torch.Tensor | None = None  # how often each id stands in the answer, [V], if there are penalties

    def cancel(self) -> None:
        """Give up the rest; harmless at any time and from any thread."""
        self._cancelled = True

    def expire_at(self, moment: float, error: TimeLimit) -> None:
        """End with `error`, if nothing else has ended the answer by then (of `time.monotonic()`)."""
        self._timer = self._loop.call_later(moment - time.monotonic(), deliver, [(self, error)])

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
    """Wait until `take` has something to give for one of the answers. One waiter at a time for each answer."""
    if any(answer._events for answer in answers):
        return
    waiter = asyncio.get_running_loop().create_future()
    for answer in answers:
        answer._waiter = waiter
    await waiter


def deliver(events: list[tuple[Answer, Token | Exception | str]]) -> None:
    for answer, event in events:
        answer._events.append(event)
        if answer._timer is not None and not isinstance(event, Token):
            answer._timer.cancel()
        if answer._waiter is not None and not answer._waiter.done():
            answer._waiter.set_result(None)


def cancel(answers: list[Answer]) -> None:
    for answer in answers:
        answer.cancel()
