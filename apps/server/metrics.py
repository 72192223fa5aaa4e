"""What GET /metrics shows."""

import contextlib
import time
from collections.abc import AsyncIterator

import prometheus_client as prometheus

from .answers import Answer
from .errors import ApiError
from .pieces import Piece


class Metrics:
    """What GET /metrics shows."""

    def __init__(self):
        self.registry = prometheus.CollectorRegistry()

        def make(kind, name: str, text: str, *arguments, **options):
            return kind(f"chatglm_{name}", text, *arguments, registry=self.registry, **options)

        self.requests = make(prometheus.Counter, "requests", "Requests by path and status", ["path", "status"])
        self.prompt_tokens = make(prometheus.Counter, "prompt_tokens", "Tokens read")
        self.tokens = make(prometheus.Counter, "tokens", "Tokens written")
        self.running = make(prometheus.Gauge, "running", "Answers being decoded")
        self.waiting = make(prometheus.Gauge, "waiting", "Answers in the queue")
        buckets = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
        self.first = make(prometheus.Histogram, "first_text_seconds", "Until the first text", buckets=buckets)
        self.queued = make(prometheus.Histogram, "queue_seconds", "From the queue to the batch", buckets=buckets)
        gaps = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
        self.gap = make(prometheus.Histogram, "gap_seconds", "Between two tokens, prompts read included", buckets=gaps)
        rows = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.batch = make(prometheus.Histogram, "batch_answers", "Answers in a step", buckets=rows)
        lengths = (1, 4, 16, 64, 128, 256, 512, 1024, 2048)
        self.length = make(prometheus.Histogram, "answer_tokens", "Tokens written for a request", buckets=lengths)
        self.read = make(prometheus.Histogram, "request_prompt_tokens", "Tokens read for a request", buckets=lengths)
        self.refusals = make(prometheus.Counter, "refusals", "Requests refused, by cause", ["cause"])
        self.whole = make(prometheus.Histogram, "answer_seconds", "Until the end of the answer", buckets=buckets)

    def step(self, rows: int, seconds: float) -> None:
        """A step of the scheduler."""
        self.batch.observe(rows)
        self.gap.observe(seconds)

    def refuse(self, error: ApiError) -> None:
        """An error that a client is told."""
        told = error.body["error"]
        self.refusals.labels(told["code"] or told["type"]).inc()

    async def watch(
        self, parts: AsyncIterator[Piece], answers: list[Answer], prompt_tokens: int
    ) -> AsyncIterator[Piece]:
        """Passes pieces on, and counts them."""
        start, count = time.monotonic(), 0
        self.read.observe(prompt_tokens)
        self.prompt_tokens.inc(prompt_tokens)
        first = True
        async with contextlib.aclosing(parts):
            async for piece in parts:
                if first:
                    self.first.observe(time.monotonic() - start)
                    first = False
                    for answer in answers:
                        if answer.began is not None:
                            self.queued.observe(answer.began - answer.submitted)
                count += piece.count
                self.tokens.inc(piece.count)
                yield piece
        self.length.observe(count)
        self.whole.observe(time.monotonic() - start)
