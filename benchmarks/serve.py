"""Load on the API server: throughput and first-token time at 16 clients over one, and a soak with hang-ups.

    python benchmarks/serve.py [--model FOLDER] [--device DEVICE] [--dtype DTYPE] [--clients 16] [--seconds 30]
    python benchmarks/serve.py --soak [--clients 64] [--seconds 180]
    python benchmarks/serve.py --random 28 --fixed [--device cuda]

It starts `chatglm serve`, asks it over HTTP from this process, and prints a table. The soak asks for answers of
5 to 200 tokens; a third of the requests hang up in the middle, and every answer that is read to its end is compared
with the one that the server gave when it was asked nothing else. `--random` measures random weights in the shape of
ChatGLM-6B-INT8, made in memory.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
BATCH, QUEUE = 16, 128  # of the server


def read_questions() -> list[str]:
    """First questions of the dialogues in examples/."""
    questions = []
    for name in ("dialogues_en.jsonl", "dialogues_zh.jsonl"):
        for line in (ROOT / "examples" / name).read_text(encoding="utf-8").splitlines():
            questions += json.loads(line)["turns"][0]["ask"]
    return sorted(set(questions))


def serve_random(layers: int, device: str | None, dtype: str, port: int) -> None:
    """What `chatglm serve` does, for a model of random weights and a vocabulary that has a text for each of its ids."""
    import torch
    import uvicorn
    from random_model import random_model

    from chatglm_int8 import ChatGLMTokenizer
    from chatglm_int8.apps.server.app import create_app
    from chatglm_int8.apps.server.scheduler import Scheduler
    from chatglm_int8.apps.server.settings import Settings

    model = random_model(layers, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # As embedding and head are one matrix, the likeliest token would always be the last one again.
    torch.nn.init.normal_(model.transformer.final_layernorm.weight)
    if dtype != "auto":
        model.to(getattr(torch, dtype))
    vocabulary = ROOT / "ice_text.model"
    missing = model.config.vocab_size - len(ChatGLMTokenizer(vocabulary, num_image_tokens=0))
    tokenizer = ChatGLMTokenizer(vocabulary, num_image_tokens=missing)
    for name in ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    settings = Settings(max_batch=BATCH, max_queue=QUEUE)
    scheduler = Scheduler(model, tokenizer, BATCH, QUEUE)
    uvicorn.run(create_app(settings, scheduler), port=port, log_level="warning")


class Server:
    """A server on a free port, which its command gets as `--port`."""

    def __init__(self, command: list[str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        start = time.monotonic()
        self.process = subprocess.Popen([sys.executable, *command, "--port", str(port)], stdout=subprocess.DEVNULL)
        while True:
            try:
                httpx.get(self.url + "/health").raise_for_status()
                break
            except httpx.HTTPError:
                if self.process.poll() is not None:
                    sys.exit(f"The server ended with code {self.process.returncode}.")
                time.sleep(0.1)
        self.started_in = time.monotonic() - start

    def memory(self) -> float:
        """Resident memory in MB; 0 where the system does not tell."""
        try:
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        except OSError:
            return 0.0
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

    def gauge(self, name: str) -> float:
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"chatglm_{name} "))


class Reply:
    """What came of one request: status, text, tokens, seconds to the first text, and whether it came to its end."""

    def __init__(self):
        self.status = 0
        self.text = ""
        self.tokens = 0
        self.first: float | None = None
        self.complete = False


async def ask(client: httpx.AsyncClient, question: str, leave_after: int | None = None, **fields) -> Reply:
    """One streamed chat; with `leave_after`, hang up after so many pieces of text."""
    reply = Reply()
    body = {
        "model": "chatglm",
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    pieces = 0
    start = time.monotonic()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        reply.status = response.status_code
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                reply.complete = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    reply.text += f" ERROR {event['error']['message']}"
                    break
                if event["usage"]:
                    reply.tokens = event["usage"]["completion_tokens"]
                for choice in event["choices"]:
                    if new := choice["delta"].get("content"):
                        reply.first = reply.first or time.monotonic() - start
                        reply.text += new
                        pieces += 1
            if leave_after is not None and pieces >= leave_after:
                break
    return reply


def connect(server: Server, clients: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    return httpx.AsyncClient(base_url=server.url, limits=limits, timeout=300)


async def load(
    server: Server, clients: int, seconds: float, questions: list[str], limit: int, fixed: bool
) -> tuple[float, list]:
    """Tokens a second and the replies, of clients that each ask again as soon as they have an answer."""
    replies = []
    end = time.monotonic() + seconds

    async def work(number: int, client: httpx.AsyncClient) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            fields = {"seed": chance.randrange(1000), "max_tokens": limit}
            if fixed:
                fields["min_tokens"] = limit
            replies.append(await ask(client, chance.choice(questions), **fields))

    async with connect(server, clients) as client:
        start = time.monotonic()
        await asyncio.gather(*(work(number, client) for number in range(clients)))
        taken = time.monotonic() - start
    failed = [reply.status for reply in replies if reply.status != 200 or not reply.complete]
    if failed:
        sys.exit(f"{len(failed)} of {len(replies)} requests failed: {failed[:5]}")
    return sum(reply.tokens for reply in replies) / taken, replies


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def compare(server: Server, clients: int, seconds: float, limit: int, fixed: bool) -> None:
    questions = read_questions()
    await load(server, clients, 5, questions, limit, fixed)  # a GPU records steps of each number of rows
    print(f"{'clients':>8}{'answers':>9}{'tokens/s':>10}{'first token: median':>21}{'95 %':>9}")
    results = []
    for count in (1, clients):
        rate, replies = await load(server, count, seconds, questions, limit, fixed)
        firsts = [reply.first for reply in replies if reply.first]
        results.append((rate, percentile(firsts, 0.95)))
        median = statistics.median(firsts)
        print(f"{count:>8}{len(replies):>9}{rate:>10.1f}{median * 1e3:>18.0f} ms{results[-1][1] * 1e3:>6.0f} ms")
    print(f"ratio of throughput {results[1][0] / results[0][0]:.2f}")
    print(f"ratio of first-token times, 95th percentiles {results[1][1] / results[0][1]:.2f}")


async def soak(server: Server, clients: int, seconds: float) -> bool:
    """Whether nothing went wrong."""
    chance = random.Random(5)
    jobs = []
    for question in chance.sample(read_questions(), 40):
        fields = {"seed": chance.randrange(1000), "max_tokens": chance.randint(5, 200)}
        if chance.random() < 0.6:
            fields["min_tokens"] = fields["max_tokens"]
        jobs.append((question, fields))
    async with connect(server, clients) as client:
        alone = [await ask(client, question, **fields) for question, fields in jobs]
    lengths = [reply.tokens for reply in alone]
    print(f"{len(jobs)} answers alone: {min(lengths)} to {max(lengths)} tokens, mean {statistics.mean(lengths):.0f}")

    count = {"complete": 0, "hung up": 0, "wrong": 0, "lost": 0}
    statuses: dict[int, int] = {}
    memory: list[float] = []
    end = time.monotonic() + seconds

    async def work(number: int) -> None:
        chance = random.Random(number)
        async with connect(server, 1) as client:
            while time.monotonic() < end:
                index = chance.randrange(len(jobs))
                question, fields = jobs[index]
                leave = chance.randint(1, 10) if chance.random() < 1 / 3 else None
                reply = await ask(client, question, leave, **fields)
                statuses[reply.status] = statuses.get(reply.status, 0) + 1
                if leave is not None and not reply.complete:
                    count["hung up"] += 1
                elif not reply.complete:
                    count["lost"] += 1
                    print(f"lost: {reply.status} {reply.text[-100:]!r}")
                elif reply.text != alone[index].text:
                    count["wrong"] += 1
                    print(f"wrong: {reply.text!r}, not {alone[index].text!r}")
                else:
                    count["complete"] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(seconds / 12)
            memory.append(server.memory())

    await asyncio.gather(watch(), *(work(number) for number in range(clients)))
    await asyncio.sleep(1)
    left = server.gauge("running") + server.gauge("waiting")
    print(f"{clients} clients for {seconds:.0f} s: {count}, statuses {statuses}, left in the batch: {left:.0f}")
    print("memory in MB: " + " ".join(f"{value:.0f}" for value in memory))
    return not (count["wrong"] or count["lost"] or left or any(status >= 500 for status in statuses))


def main() -> int:
    parser = argparse.ArgumentParser(description="Load on the API server.")
    parser.add_argument("--model", default=str(ROOT), metavar="FOLDER")
    parser.add_argument(
        "--random", type=int, metavar="LAYERS", help="random weights instead of a folder; the 6B has 28"
    )
    parser.add_argument("--device")
    parser.add_argument("--dtype", help="of the server; auto by default, float32 for the soak")
    parser.add_argument("--clients", type=int, help="16, or 64 for the soak")
    parser.add_argument("--seconds", type=float, help="of each measurement; 30, or 180 for the soak")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer, without --soak (default: 64)")
    parser.add_argument("--fixed", action="store_true", help="answers that fill --max-tokens, as of random weights")
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # with which this starts itself, for --random
    arguments = parser.parse_args()
    dtype = arguments.dtype or ("float32" if arguments.soak else "auto")
    if arguments.port:
        serve_random(arguments.random, arguments.device, dtype, arguments.port)
        return 0
    options = ["--dtype", dtype] + (["--device", arguments.device] if arguments.device else [])
    if arguments.random:
        command = [__file__, "--random", str(arguments.random), *options]
    else:
        command = ["-m", "chatglm_int8.apps", "serve", "--model", arguments.model, *options]
        command += ["--max-batch", str(BATCH), "--max-queue", str(QUEUE)]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores: {' '.join(command)}")
    server = Server(command)
    print(f"answers /health after {server.started_in:.1f} s, {server.memory():.0f} MB")
    try:
        if arguments.soak:
            return 0 if asyncio.run(soak(server, arguments.clients or 64, arguments.seconds or 180)) else 1
        asyncio.run(
            compare(server, arguments.clients or 16, arguments.seconds or 30, arguments.max_tokens, arguments.fixed)
        )
    finally:
        server.process.terminate()
        print(f"after SIGTERM the server ended with {server.process.wait()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
