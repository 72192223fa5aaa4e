"""Answers in parts, as they are sent to clients."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from .answer_text import AnswerText, TokenTexts
from .answers import Answer, Token, arrival, cancel
from .errors import ApiError

SEND = "chatglm.send"  # in a scope: what the HTTP server gave to send with


@dataclasses.dataclass
class Piece:
    """A part of choice `index`: text, and the tokens that it is made of. The last one has a finish_reason."""

    index: int
    text: str
    tokens: list[Token]
    finish_reason: str | None = None
    count: int = 0  # of new tokens: those of an echoed prompt are not
    offset: int = 0  # of the text in the choice


async def pieces(
    answers: list[Answer],
    texts: list[AnswerText],
    echoes: list[Callable[[int, Answer], Piece]] | None = None,
    reported: bool = False,
) -> AsyncIterator[Piece]:
    """The parts of all answers as they come. Leaving the iteration cancels them.

    What has come while the last part was being sent is one part: a slow client catches up.

    Args:
        answers, texts: what is decoded, and its text.
        echoes: for each answer, a function of its index and itself that makes the piece before it; None: no echo.
        reported: cut the text where tokens end, and name each token's part of it.
    """
    unreported = [0] * len(answers)  # tokens with text that is still held back
    tokens = [TokenTexts(text.length) for text in texts]
    unfinished = list(range(len(answers)))
    to_echo = {} if echoes is None else dict(enumerate(echoes))
    try:
        while unfinished:
            await arrival([answers[index] for index in unfinished])
            for index in list(unfinished):
                answer, text = answers[index], texts[index]
                new = ""
                for token in answer.take():
                    unreported[index] += 1
                    step = text.step(token.id)
                    new += step
                    if reported:
                        tokens[index].add(token, step, text.length)
                    if text.stopped:
                        break
                ended = text.stopped or answer.finish_reason is not None
                if (unreported[index] or ended) and index in to_echo:
                    yield to_echo.pop(index)(index, answer)
                if ended:
                    unfinished.remove(index)
                    answer.cancel()
                    end = text.finish()
                    reason = "stop" if text.stopped else answer.finish_reason
                    taken = tokens[index].finish(end) if reported else []
                    whole = "".join([token.text for token in taken]) if taken else new + end
                    yield Piece(index, whole, taken, reason, unreported[index])
                    continue
                taken = tokens[index].take() if reported else []
                new = "".join([token.text for token in taken]) if reported else new
                if new or taken:
                    count = len(taken) if reported else unreported[index]
                    unreported[index] -= count
                    yield Piece(index, new, taken, None, count)
    finally:
        cancel(answers)


async def unless_gone(request: Request, work: Awaitable, answers: list[Answer]) -> Any:
    """What `work` returns; it and the answers that it waits for are cancelled if the client hangs up first."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(hung_up())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ApiError(499, "The client hung up.")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        cancel(answers)


class EventStream(Response):
    """A stream of events; it cancels its answers however it ends, even before it has begun.

    Events go straight to the HTTP server, past the layers of the application (`SEND` in the scope, from the gate).
    """

    def __init__(self, events: AsyncIterator[bytes], answers: list[Answer]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events
        self._answers = answers

    async def __call__(self, scope, receive, send) -> None:
        listening = asyncio.ensure_future(self._listen(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            send = scope.get(SEND, send)
            async with contextlib.aclosing(self._events):
                async for data in self._events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            listening.cancel()
            cancel(self._answers)

    async def _listen(self, receive) -> None:
        """Once the client has hung up, its answers end."""
        while (await receive())["type"] != "http.disconnect":
            pass
        cancel(self._answers)
