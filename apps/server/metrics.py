"""What GET /metrics shows."""

import contextlib
import time
from collections.abc import AsyncIterator

import prometheus_client as prometheus

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
        self.whole = make(prometheus.Histogram, "answer_seconds", "Until the end of the answer", buckets=buckets)

    async def watch(self, parts: AsyncIterator[Piece], prompt_tokens: int) -> AsyncIterator[Piece]:
        """Passes pieces on, and counts them."""
        start = time.monotonic()
        self.prompt_tokens.inc(prompt_tokens)
        first = True
        async with contextlib.aclosing(parts):
            async for piece in parts:
                if first:
                    self.first.observe(time.monotonic() - start)
                    first = False
                self.tokens.inc(piece.count)
                yield piece
        self.whole.observe(time.monotonic() - start)
