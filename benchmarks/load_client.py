"""Clients of a server in OpenAI's form that cost little: in processes of their own, over raw sockets.

    python benchmarks/load_client.py PORT CLIENTS SECONDS MAX_TOKENS [PROCESSES]

Each client asks again as soon as it has its answer.
"""

import asyncio
import dataclasses
import json
import multiprocessing
import random
import sys
import time

QUESTIONS = [
    "你好，请介绍一下你自己",
    "What can you do?",
    "晚上睡不着应该怎么办",
    "Tell me about quantisation",
    "写一首诗",
]
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
)
COUNT = b'"completion_tokens":'


@dataclasses.dataclass
class Load:
    """What a load came to. Times are in seconds, sorted; tokens are those of whole answers."""

    answers: int
    failed: int
    tokens: int
    seconds: float
    firsts: list[float]
    gaps: list[float]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.answers:>9}{self.failed:>8}{self.rate:>10.1f}"
            f"{share(self.firsts, 0.5) * 1e3:>13.0f}{share(self.firsts, 0.95) * 1e3:>8.0f} ms"
            f"{share(self.gaps, 0.5) * 1e3:>10.1f}{share(self.gaps, 0.99) * 1e3:>8.1f} ms"
        )


HEADER = f"{'answers':>9}{'failed':>8}{'tokens/s':>10}{'first: 50 %':>13}{'95 %':>11}{'gap: 50 %':>10}{'99 %':>11}"


def share(values: list[float], part: float) -> float:
    """The value that `part` of the sorted `values` are not above."""
    return values[min(len(values) - 1, int(part * len(values)))] if values else float("nan")


async def ask(port: int, body: dict) -> tuple[int, float | None, list[float]]:
    """Tokens of one streamed answer, 0 if it did not come to its end; seconds to its first text and between events."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    start = time.monotonic()
    writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content)
    first, last, gaps, tail = None, start, [], b""
    while data := await reader.read(1 << 16):
        tail = (tail + data)[-2000:]
        empty = data.count(b'"content":""') + data.count(b'"content": ""')
        if data.count(b'"content"') > empty:
            now = time.monotonic()
            if first is None:
                first = now - start
            else:
                gaps.append(now - last)
            last = now
    writer.close()
    place = tail.rfind(COUNT)
    if place < 0 or b"data: [DONE]" not in tail:
        return 0, first, gaps
    number = tail[place + len(COUNT) :].split(b",")[0].split(b"}")[0]
    return int(number), first, gaps


def clients(port: int, count: int, seconds: float, tokens: int, fixed: bool, seed: int, results) -> None:
    """What one process does."""
    found = []

    async def work(number: int) -> None:
        chance = random.Random(seed * 1000 + number)
        while time.monotonic() < end:
            body = {
                "model": "chatglm",
                "messages": [{"role": "user", "content": chance.choice(QUESTIONS)}],
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_tokens": tokens,
                "min_tokens": tokens if fixed else 0,
                "seed": chance.randrange(1000),
            }
            found.append(await ask(port, body))

    async def together() -> None:
        await asyncio.gather(*(work(number) for number in range(count)))

    start = time.monotonic()
    end = start + seconds
    asyncio.run(together())
    results.put((time.monotonic() - start, found))


def load(port: int, count: int, seconds: float, tokens: int, fixed: bool = True, processes: int = 8) -> Load:
    """Put a server under load."""
    processes = min(processes, count)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    parts = [count // processes + (index < count % processes) for index in range(processes)]
    running = [
        context.Process(target=clients, args=(port, part, seconds, tokens, fixed, index, results))
        for index, part in enumerate(parts)
    ]
    for process in running:
        process.start()
    collected = [results.get() for _ in running]
    for process in running:
        process.join()
    answers = [answer for _, found in collected for answer in found]
    return Load(
        len(answers),
        sum(not answer[0] for answer in answers),
        sum(answer[0] for answer in answers),
        max(seconds for seconds, _ in collected),
        sorted(answer[1] for answer in answers if answer[1] is not None),
        sorted(gap for answer in answers for gap in answer[2]),
    )


if __name__ == "__main__":
    print(HEADER)
    print(load(*(int(argument) for argument in sys.argv[1:5]), processes=int((sys.argv[5:] or ["8"])[0])))
