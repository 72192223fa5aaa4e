"""Ray Serve: two replicas of the embedded model, of which one is killed under load."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("ray.serve", reason='needs Ray Serve: pip install ".[ray]"')
httpx = pytest.importorskip("httpx", reason="needs httpx: pip install httpx")
psutil = pytest.importorskip("psutil", reason="needs psutil: pip install psutil")

from chatglm_int8.apps.loading import load  # noqa: E402

pytestmark = pytest.mark.slow  # starts a cluster of one machine

CHAT = "/v1/chat/completions"
QUERIES = ["你好", "Hello", "What can you do?", "中国的首都是哪里？", "Tell me a joke", "你是谁"]
CLIENTS = 6


class Cluster:
    """`chatglm ray` with two replicas."""

    def __init__(self, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "chatglm_int8.apps", "ray", "--port", str(port), "--dtype", "float32"]
        command += ["--min-replicas", "2", "--max-replicas", "2", "--cpus", "0.5", "--device", "cpu"]
        self.log = log
        with open(log, "wb") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def wait_for_replicas(self, seconds: float = 240) -> set[int]:
        """Processes of two replicas that answer."""
        end = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, self.log.read_text(errors="replace")
            assert time.monotonic() < end, self.log.read_text(errors="replace")[-3000:]
            replicas = self.replicas()
            if len(replicas) == 2 and b"Serving on" in self.log.read_bytes():
                return replicas
            time.sleep(0.5)

    def replicas(self) -> set[int]:
        found = set()
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "ServeReplica" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.add(process.pid)
            except psutil.NoSuchProcess:
                pass
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    running = Cluster(tmp_path_factory.mktemp("ray") / "log")
    try:
        running.wait_for_replicas()
        yield running
    finally:
        running.process.send_signal(signal.SIGTERM)
        try:
            assert running.process.wait(timeout=120) == 0
        finally:
            running.process.kill()


@pytest.fixture(scope="module")
def expected():
    """(query, seed) → what `chat` answers."""
    model, tokenizer = load(str(ROOT), "cpu", "float32")
    answers = {}
    for query in QUERIES:
        for seed in range(2):
            torch.manual_seed(seed)
            answers[query, seed] = model.chat(tokenizer, query)[0]
    return answers


def ask(client, query: str, seed: int, stream: bool) -> str:
    """The answer. Raises httpx.HTTPError or EOFError if it does not come to its end."""
    messages = [{"role": "user", "content": query}]
    body = {"model": "chatglm", "messages": messages, "seed": seed, "stream": stream}
    if not stream:
        return client.post(CHAT, json=body).raise_for_status().json()["choices"][0]["message"]["content"]
    text = ""
    with client.stream("POST", CHAT, json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line == "data: [DONE]":
                return text
            if line:
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
    raise EOFError("the stream broke off")


def test_streams_come_piece_by_piece(cluster):
    """Through Ray's proxy, and errors keep their form."""
    body = {"model": "chatglm", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    body |= {"min_tokens": 150, "max_tokens": 150}
    with httpx.stream("POST", cluster.url + CHAT, json=body, timeout=120) as response:
        times = [time.monotonic() for line in response.iter_lines() if line]
    assert len(times) > 100
    assert times[len(times) // 4] - times[0] < 0.7 * (times[-1] - times[0])
    wrong = httpx.post(cluster.url + CHAT, json={**body, "temperature": 9}, timeout=60)
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "temperature"


def test_a_killed_replica_takes_only_its_own_requests_along(cluster, expected):
    """And another takes its place."""
    before = cluster.wait_for_replicas()
    victim = min(before)
    done: list[tuple[float, float, str]] = []  # start, end, what went wrong
    ending = threading.Event()

    def work(number: int) -> None:
        chance = random.Random(number)
        with httpx.Client(base_url=cluster.url, timeout=120) as client:
            while not ending.is_set():
                (query, seed), answer = chance.choice(list(expected.items()))
                start = time.monotonic()
                try:
                    trouble = "" if ask(client, query, seed, chance.random() < 0.5) == answer else "wrong"
                except (httpx.HTTPError, EOFError) as error:
                    trouble = repr(error)
                done.append((start, time.monotonic(), trouble))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(5)
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        time.sleep(10)
        after = cluster.wait_for_replicas()
        time.sleep(5)
    finally:
        ending.set()
        for thread in threads:
            thread.join()

    assert victim not in after
    failed = [entry for entry in done if entry[2]]
    print(f"{len(done)} requests, failed: {[(start - killed, end - killed, what) for start, end, what in failed]}")
    assert not [entry for entry in failed if entry[2] == "wrong"]
    # In flight means: begun before the end of the process, and not answered by then.
    assert all(start < killed < end for start, end, _ in failed), failed
    assert len(failed) < CLIENTS  # the other replica had some
    assert sum(start > killed for start, _, _ in done) > CLIENTS
    with httpx.Client(base_url=cluster.url, timeout=60) as client:
        for (query, seed), answer in expected.items():
            assert ask(client, query, seed, stream=True) == answer
