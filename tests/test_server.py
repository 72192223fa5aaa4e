"""The server: OpenAI's API, what asks for nothing and for too much, and what clients can do wrong."""

import argparse
import contextlib
import functools
import inspect
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from chatglm_int8 import ChatGLMForConditionalGeneration

for needed in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai", "schemathesis"):
    pytest.importorskip(needed, reason=f'needs {needed}: pip install -e ".[test]"')

import httpx  # noqa: E402
import openai  # noqa: E402
import schemathesis  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from uvicorn.protocols.http import h11_impl  # noqa: E402

from chatglm_int8.apps import cli  # noqa: E402
from chatglm_int8.apps.loading import load  # noqa: E402
from chatglm_int8.apps.server import connections, forms, gate, log, settings  # noqa: E402
from chatglm_int8.apps.server.app import create_app  # noqa: E402
from chatglm_int8.apps.server.http_server import HttpServer, http_config  # noqa: E402
from chatglm_int8.apps.server.prompts import Prompts  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CHAT = "/v1/chat/completions"
QUERIES = ["你好", "Hello", "What can you do?", "中国的首都是哪里？", "Tell me a joke", "你是谁", "Thank you", "谢谢"]
LONG = {"min_tokens": 30, "max_tokens": 30, "temperature": 0}
HOURS = {"min_tokens": 1900, "max_tokens": 1900}


class Running:
    """A server in a thread of this process."""

    def __init__(self, drain: float = 60.0, **given):
        self.app = create_app(settings.Settings(**{"device": "cpu", "dtype": "float32", **given}))
        address = argparse.Namespace(host="127.0.0.1", port=0, keep_alive=75)
        self.server = HttpServer(http_config(self.app, address), drain, lambda: self.scheduler.close())
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        _, port = self.server.servers[0].sockets[0].getsockname()
        self.url = f"http://127.0.0.1:{port}"
        self.scheduler = self.app.state.service.scheduler
        self.http = httpx.Client(base_url=self.url, timeout=120)
        return self

    def __exit__(self, *_):
        self.http.close()
        self.server.should_exit = True
        self.thread.join()

    def chat(self, query: str = "你好", **fields) -> httpx.Response:
        body = {"model": "chatglm", "messages": [{"role": "user", "content": query}], **fields}
        return self.http.post(CHAT, json=body)

    def wait_until_empty(self, seconds: float = 5) -> None:
        end = time.monotonic() + seconds
        while self.scheduler.running + self.scheduler.waiting:
            assert time.monotonic() < end, "answers that nobody waits for are still there"
            time.sleep(0.01)


@pytest.fixture(scope="module")
def server():
    with Running() as running:
        yield running


@pytest.fixture(scope="module")
def small_server():
    """Short answers and a short queue."""
    with Running(max_length=40, max_batch=2, max_queue=2, max_body=20_000) as running:
        yield running


@pytest.fixture(scope="module")
def reference():
    """Model and tokenizer of our own."""
    return load(str(ROOT), "cpu", "float32")


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def user(query: str) -> list[dict]:
    return [{"role": "user", "content": query}]


def test_answers_are_those_of_chat_alone_and_under_load(server, reference, client):
    """Same seed, same prompt: word for word, with and without history, streamed or not."""
    model, tokenizer = reference
    history = [("Hello", "Hello! Ask me something simple.")]
    jobs = []
    for seed, query in enumerate(QUERIES * 2):
        past = history if seed % 3 == 0 else []
        options = {"temperature": 1.8, "top_p": 0.95} if seed % 4 == 1 else {}
        torch.manual_seed(seed)
        jobs.append((query, past, seed, options, model.chat(tokenizer, query, past, **options)[0]))

    def ask(job):
        query, past, seed, options, expected = job
        messages = [
            message for asked, said in past for message in (*user(asked), {"role": "assistant", "content": said})
        ]
        arguments = {"model": "chatglm", "messages": messages + user(query), "seed": seed, **options}
        if seed % 2:
            return client.chat.completions.create(**arguments).choices[0].message.content, expected
        chunks = client.chat.completions.create(**arguments, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), expected

    for job in jobs[:4]:
        assert len(set(ask(job))) == 1
    with ThreadPoolExecutor(16) as pool:
        for got, expected in pool.map(ask, jobs):
            assert got == expected
    assert len({job[-1] for job in jobs}) > 8


def test_openai_client(client, reference):
    """As against the original service: reply, stream with usage, n, stop, logprobs, models."""
    create = client.chat.completions.create
    model, tokenizer = reference
    expected = model.chat(tokenizer, "Hello", do_sample=False)[0]
    count = len(tokenizer(expected, add_special_tokens=False)["input_ids"])

    reply = create(model="chatglm", messages=user("Hello"), temperature=0)
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == expected
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].logprobs is None
    assert abs(reply.usage.completion_tokens - count) <= 2  # the tokenizer may cut the same text otherwise
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    again = create(model="chatglm", messages=[*user("Hello"), reply.choices[0].message, *user("Thank you")])
    assert again.choices[0].message.content

    options = {"include_usage": True}
    chunks = list(create(model="chatglm", messages=user("Hello"), temperature=0, stream=True, stream_options=options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-2:] == [None, "stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == reply.usage
    assert len({chunk.id for chunk in chunks}) == 1

    cut = create(model="chatglm", messages=user("Hello"), temperature=0, stop=["very small", "never"])
    assert cut.choices[0].message.content == expected.split("very small")[0].rstrip()
    assert cut.choices[0].finish_reason == "stop"
    limited = create(model="chatglm", messages=user("Hello"), temperature=0, max_completion_tokens=3)
    assert limited.choices[0].finish_reason == "length"
    assert limited.usage.completion_tokens == 3
    assert expected.startswith(limited.choices[0].message.content)

    several = create(model="chatglm", messages=user("讲个笑话"), n=3, seed=5, temperature=2, top_p=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in several.choices]
    assert len(set(texts)) == 3
    for index, text in enumerate(texts):
        torch.manual_seed(5 + index)
        assert model.chat(tokenizer, "讲个笑话", temperature=2.0, top_p=1.0)[0] == text
    streams = ["", "", ""]
    for chunk in create(model="chatglm", messages=user("讲个笑话"), n=3, seed=5, temperature=2, top_p=1, stream=True):
        streams[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streams == texts

    scored = create(model="chatglm", messages=user("你好"), temperature=0, logprobs=True, top_logprobs=4)
    content = scored.choices[0].logprobs.content
    assert len(content) == scored.usage.completion_tokens
    assert all(len(token.top_logprobs) == 4 for token in content)
    assert all(token.top_logprobs[0].token == token.token for token in content)  # greedy
    assert all(token.logprob <= 0 for token in content)
    decoded = b"".join(bytes(token.bytes) for token in content).decode()
    assert model.process_response(decoded) == scored.choices[0].message.content
    streamed = create(model="chatglm", messages=user("你好"), temperature=0, logprobs=True, top_logprobs=4, stream=True)
    parts = [
        part for chunk in streamed for part in ((chunk.choices[0].logprobs or {}) and chunk.choices[0].logprobs.content)
    ]
    assert [part.token for part in parts] == [token.token for token in content]

    assert [card.id for card in client.models.list()] == ["chatglm"]
    assert client.models.retrieve("chatglm").id == "chatglm"


def test_openai_client_completions(client):
    reply = client.completions.create(model="chatglm", prompt=["Hello", "你好"], temperature=0, logprobs=2, n=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in reply.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    scores = reply.choices[0].logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs)
    chunks = client.completions.create(model="chatglm", prompt="Hello", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == texts[0]
    with pytest.raises(openai.BadRequestError, match="more than 80 answers"):
        client.completions.create(model="chatglm", prompt=["Hello"] * 11, n=8)
    # Text never becomes a special token.
    whole = client.completions.create(model="chatglm", prompt="<sop>", max_tokens=1).usage.prompt_tokens
    assert whole > 3


def test_openai_client_errors(client):
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt-4o", messages=user("Hello"))
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        create(model="chatglm", messages=user("Hello"), temperature=3)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        create(model="chatglm", messages=user("word " * 4000))
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        create(model="chatglm", messages=user("Hello"), tools=[{"type": "function", "function": {"name": "f"}}])
    assert tools.value.code == "unknown_parameter"
    for messages, told in (
        ([{"role": "tool", "content": "4", "tool_call_id": "1"}], "messages.0.role"),
        ([{"role": "developer", "content": "x"}], '"user"'),
        ([{"role": "assistant", "content": None}, *user("x")], "messages.0.content: a message needs its text"),
        ([{"role": "assistant"}, *user("x")], "messages.0.content: a message needs its text"),
        ([{"role": "assistant", "content": "x"}], '"user"'),
        ([{"role": "user", "content": ""}], "empty"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "content.0.type"),
    ):
        with pytest.raises(openai.BadRequestError, match=told):
            create(model="chatglm", messages=messages)


def body_of(response: httpx.Response) -> dict:
    """The error in a response, after a look at its form."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    for secret in ("Traceback", ".py", str(ROOT), "site-packages"):
        assert secret not in response.text
    return body["error"]


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/nothing", None, 404),
        ("POST", CHAT + "/", b"{}", 400),
        ("GET", CHAT, None, 405),
        ("DELETE", "/v1/models", None, 405),
        ("GET", "/v1/models/other", None, 404),
        ("POST", CHAT, b"", 400),
        ("POST", CHAT, b"{", 400),
        ("POST", CHAT, b"[1]", 400),
        ("POST", CHAT, b"\xff\xfe", 400),
        ("POST", CHAT, b"[" * 10_000, 400),
        ("POST", CHAT, b'{"model": "chatglm", "messages": []}', 400),
        (
            "POST",
            CHAT,
            b'{"model": "chatglm", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
            400,
        ),
        ("POST", CHAT, b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', 404),
        ("POST", CHAT, b'{"model": "chatglm", "\\ud800": 1, "messages": [{"role": "user", "content": "x"}]}', 400),
        ("POST", "/v1/completions", b'{"model": "chatglm", "prompt": []}', 400),
        ("POST", "/v1/completions", b'{"model": "chatglm", "prompt": [1, -2]}', 400),
        ("POST", "/v1/completions", b'{"model": "chatglm", "prompt": [1, 1000000]}', 400),
        ("POST", "/v1/completions", b'{"model": "chatglm", "prompt": [1, true]}', 400),
        ("POST", "/v1/completions", b'{"model": "chatglm", "prompt": [[1], []]}', 400),
        ("POST", "/v1/completions", b'{"model": "chatglm", "prompt": [[1], "x"]}', 400),
        ("POST", "/", b'{"prompt": ""}', 400),
        ("POST", "/", b'{"prompt": "x", "history": [["a"]]}', 400),
        ("POST", CHAT, b" " * 20_001, 413),
    ],
)
def test_errors_have_one_form(small_server, method, path, content, status):
    headers = {"content-type": "application/json"}
    response = small_server.http.request(method, path, content=content, headers=headers)
    assert response.status_code == status, response.text
    body_of(response)


def test_defaults_are_those_of_chat():
    arguments = inspect.signature(ChatGLMForConditionalGeneration.chat).parameters
    for form in (forms.ChatForm, forms.CompletionForm, forms.PublicForm):
        for name in ("temperature", "top_p"):
            assert form.model_fields[name].default == arguments[name].default
    assert forms.PublicForm.model_fields["max_length"].default == arguments["max_length"].default


def test_a_body_that_does_not_arrive(small_server, monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    host, port = small_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        )
        connection.sendall(head.encode() + b'{"model"')
        assert b" 408 " in connection.recv(1000).split(b"\r\n")[0]


def test_arguments_that_contradict(small_server):
    for fields, param in (
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"min_tokens": 4, "max_tokens": 3}, "min_tokens"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
    ):
        response = small_server.chat(**fields)
        assert response.status_code == 400, fields
        assert body_of(response)["param"] == param
    assert small_server.chat(max_tokens=3, tools=None, stop=None, seed=None).status_code == 200


# What asks for nothing, in bodies of chat and of completions.
IDLE = [
    {"tools": []},
    {"tools": None, "tool_choice": None},
    {"tool_choice": "none"},
    {"tool_choice": "auto", "parallel_tool_calls": True},
    {"functions": [], "function_call": "none"},
    {"logit_bias": {}},
    {"logit_bias": {"5": 0, "6": 0.0}},
    {"response_format": {"type": "text"}},
    {"store": False},
    {"store": True, "metadata": {"a": "b"}},
    {"parallel_tool_calls": False},
    {"user": "someone", "safety_identifier": "x", "service_tier": "auto", "prompt_cache_key": "k"},
    {"best_of": 1},
    {"best_of": 2, "n": 2},
    {"modalities": ["text"], "audio": None, "prediction": None},
    {"reasoning_effort": "none", "verbosity": "medium"},
    {"min_p": 0, "repetition_penalty": 1.0, "length_penalty": 1.0, "typical_p": 1, "use_beam_search": False},
    {"ignore_eos": False, "skip_special_tokens": True, "include_stop_str_in_output": False, "stop_token_ids": []},
    {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}},
    {"max_tokens": -1},
    {"max_tokens": 4096},
    {"top_k": -1},
    {"top_k": 0, "top_p": 1, "temperature": 1},
    {"seed": None, "stop": None, "n": None, "stream": None, "model": None},
    {"stop": ""},
    {"stop": []},
    {"stop": ["1", "2", "3", "4", "5", "6"]},
    {"stream_options": None},
    {"stream_options": {"include_usage": False}},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"echo": False},
    {"logprobs": False},
    {"suffix": "", "guided_json": None, "guided_regex": "", "documents": []},
]
IDLE_CHAT = [
    {"top_logprobs": 0, "logprobs": False},
    {"max_completion_tokens": -1},
    {"max_completion_tokens": 4096, "max_tokens": 4096},
]
IDLE_MESSAGES = [
    [{"role": "user", "content": "Hello", "name": "Ann"}],
    [{"role": "user", "content": [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}]}],
    [
        *[{"role": "user", "content": "Hello"}],
        {
            **{"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": [], "annotations": []},
            **{"audio": None, "function_call": None, "reasoning_content": "", "name": "bot", "id": "msg_1"},
        },
        *[{"role": "user", "content": "Hello", "name": None}],
    ],
]
ASKING = [
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"tool_choice": "required"},
    {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"functions": [{"name": "f"}]},
    {"function_call": {"name": "f"}},
    {"logit_bias": {"5": -100}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
    {"best_of": 3},
    {"modalities": ["text", "audio"]},
    {"audio": {"voice": "alloy", "format": "wav"}},
    {"prediction": {"type": "content", "content": "x"}},
    {"reasoning_effort": "high"},
    {"web_search_options": {"search_context_size": "low"}},
    {"min_p": 0.1},
    {"repetition_penalty": 1.2},
    {"use_beam_search": True},
    {"stop_token_ids": [5]},
    {"guided_json": {"type": "object"}},
    {"guided_regex": "a+"},
    {"suffix": "end"},
    {"continue_final_message": True},
    {"chat_template": "{{ messages }}"},
    {"documents": [{"text": "x"}]},
    {"temprature": 0.5},
]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_what_asks_for_nothing_is_taken(server, path):
    inputs = {"messages": user("Hello")} if path == CHAT else {"prompt": "Hello"}
    for fields in IDLE + (IDLE_CHAT if path == CHAT else []):
        if path == CHAT and fields == {"logprobs": False}:
            continue
        body = {"model": "chatglm", "max_tokens": 2, **inputs, **fields}
        response = server.http.post(path, json=body)
        assert response.status_code == 200, (fields, response.text)
    if path == CHAT:
        for messages in IDLE_MESSAGES:
            response = server.http.post(path, json={"model": "chatglm", "max_tokens": 2, "messages": messages})
            assert response.status_code == 200, (messages, response.text)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_what_the_model_cannot_do_is_refused_by_name(small_server, path):
    inputs = {"messages": user("Hello")} if path == CHAT else {"prompt": "Hello"}
    for fields in ASKING + ([{"echo": True}] if path == CHAT else []):
        response = small_server.http.post(path, json={"max_tokens": 2, **inputs, **fields})
        assert response.status_code == 400, fields
        error = body_of(response)
        assert error["param"] == next(iter(fields))
        assert error["param"] in error["message"]
    for message, param in (
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "messages.1.tool_calls"),
        ({"role": "assistant", "content": "x", "prefix": True}, "messages.1.prefix"),
        ({"role": "assistant", "content": None}, "messages.1.content"),
        ({"role": "tool", "content": "x"}, "messages.1.role"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages.1.content.0.type"),
    ):
        response = small_server.http.post(CHAT, json={"messages": [*user("x"), message, *user("y")]})
        assert (response.status_code, body_of(response)["param"]) == (400, param)


def test_answers_longer_than_the_room_are_clipped(small_server):
    whole = small_server.chat("Hello", max_tokens=4096, ignore_eos=True, temperature=0).json()
    assert whole["usage"]["total_tokens"] == 40
    assert whole["choices"][0]["finish_reason"] == "length"
    cut = small_server.chat("Hello", max_tokens=4, ignore_eos=True, temperature=0).json()
    assert cut["usage"]["completion_tokens"] == 4


def test_old_rounds_are_left_out_as_by_chat(small_server, reference):
    """System messages stay; the question alone may still be too long."""
    _, tokenizer = reference
    rounds = [message for i in range(6) for message in (*user(f"Hello {i}"), {"role": "assistant", "content": "Hi"})]
    system = {"role": "system", "content": "Be kind."}
    for first in ([], [system]):
        body = {"messages": [*first, *rounds, *user("你好")], "max_tokens": 1}
        response = small_server.http.post(CHAT, json=body)
        assert response.status_code == 200, response.text
        lengths = [
            len(tokenizer.apply_chat_template([*first, *rounds[2 * i :], *user("你好")], return_dict=False)) + 2
            for i in range(7)
        ]
        assert response.json()["usage"]["prompt_tokens"] == max(length for length in lengths if length < 40)
    response = small_server.http.post(CHAT, json={"messages": [*rounds, *user("word " * 60)]})
    assert body_of(response)["code"] == "context_length_exceeded"


def test_conversations_that_are_no_rounds(server, reference):
    """Question after question, several or late system messages, a greeting: as the chat template puts them."""
    model, tokenizer = reference
    system = {"role": "system", "content": "Be kind."}
    greeting = {"role": "assistant", "content": "Hi! Ask me something."}
    for messages in (
        [*user("Hello"), *user("What can you do?")],
        [system, system, *user("Hello")],
        [{**system, "role": "developer"}, *user("Hello")],
        [*user("Hello"), greeting, system, *user("What can you do?")],
        [*user("Hello"), system],
        [greeting, *user("Hello")],
        [*user("Hello"), greeting, greeting, *user("Thank you")],
    ):
        reply = server.http.post(CHAT, json={"messages": messages, "temperature": 0, "max_tokens": 8}).json()
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert reply["usage"]["prompt_tokens"] == len(ids)
        text = tokenizer.decode(model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)[0, len(ids) :])
        assert reply["choices"][0]["message"]["content"] == model.process_response(text)


def test_cors():
    """Only for pages of the given origins, whose preflight has no key."""
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = "access-control-allow-origin"
    with Running(api_key="secret", cors_origin=["https://chat.example.org"], max_length=40) as running:
        page = {"Origin": "https://chat.example.org"}
        response = running.http.options(CHAT, headers={**page, **preflight})
        assert response.status_code == 200
        assert response.headers[allowed] == page["Origin"]
        assert "authorization" in response.headers["access-control-allow-headers"]
        refused = running.http.get("/v1/models", headers=page)
        assert (refused.status_code, refused.headers[allowed]) == (401, page["Origin"])
        given = running.http.get("/v1/models", headers={**page, "Authorization": "Bearer secret"})
        assert (given.status_code, given.headers[allowed]) == (200, page["Origin"])
        other = running.http.options(CHAT, headers={"Origin": "https://evil.example.org", **preflight})
        assert other.status_code == 400
        assert allowed not in other.headers


def test_pages_of_other_sites_reach_nothing(server):
    """DNS rebinding, and requests across origins that need no preflight: nothing is generated."""
    before = server.http.get("/metrics").text
    body = json.dumps({"messages": user("Hello")})
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        for content_type in ("application/json", "text/plain"):
            response = server.http.post(CHAT, content=body, headers={**headers, "Content-Type": content_type})
            assert response.status_code == 403
            assert body_of(response)["code"] == "untrusted_page"
        assert server.http.get("/v1/models", headers=headers).status_code == 403
    after = server.http.get("/metrics").text
    tokens = [line for line in before.splitlines() if "tokens_total" in line]
    assert all(line in after for line in tokens)
    with Running(allowed_host=["chat.example.org"], max_length=40) as running:
        assert running.http.get("/v1/models", headers={"Host": "chat.example.org"}).status_code == 200


def test_no_cors_without_the_option(server):
    assert "access-control-allow-origin" not in server.http.get("/health", headers={"Origin": "https://a.org"}).headers


def test_head_and_slashes(server):
    for path in ("/v1/models", "/v1/models/chatglm", "/health"):
        got, head = server.http.get(path), server.http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == got.headers["content-length"]
        assert server.http.get(path + "/").text == got.text
    assert server.http.head(CHAT).status_code == 405
    assert server.http.head("/nothing").status_code == 404
    body = {"model": "chatglm", "messages": user("Hello"), "max_tokens": 1}
    assert server.http.post(CHAT + "/", json=body).status_code == 200


def test_http_server_does_not_depend_on_what_is_installed():
    """uvicorn would take httptools and websockets if they were there. uvloop changes no reply."""
    parser = argparse.ArgumentParser()
    settings.add_address_arguments(parser)
    config = http_config(None, parser.parse_args([]))
    assert (config.http, config.ws) == (connections.Connection, "none")
    assert issubclass(config.http, h11_impl.H11Protocol)
    assert config.timeout_keep_alive == 75
    assert http_config(None, parser.parse_args(["--keep-alive", "9"])).timeout_keep_alive == 9


def test_upgrades_are_ignored(server):
    """A client that offers h2c still gets its answer."""
    body = json.dumps({"messages": user("Hello"), "max_tokens": 1}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += "Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b" 200 " in connection.recv(1000).split(b"\r\n")[0]


def test_usage_in_every_event(server):
    """As guidellm reads it."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"max_tokens": 6, "ignore_eos": True, "stream": True, "stream_options": options}
    events = server.chat("Hello", **body).text.split("\n\n")
    usages = [json.loads(event[6:])["usage"] for event in events if event.startswith("data: {")]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 6)
    assert len({usage["prompt_tokens"] for usage in usages}) == 1


def texts_of(content: list[dict]) -> tuple[str, str]:
    """The text of tokens with log-probabilities, and that of their bytes."""
    return "".join(token["token"] for token in content), bytes(
        [byte for token in content for byte in token["bytes"]]
    ).decode(errors="replace")


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1.9, "top_p": 1, "top_k": 0, "max_tokens": 30}])
def test_tokens_with_logprobs_make_up_the_content(server, fields):
    for seed, query in enumerate(QUERIES[:3]):
        fields = {**fields, "seed": seed, "logprobs": True, "top_logprobs": 2, "stop": ["！", "e t"]}
        choice = server.chat(query, **fields).json()["choices"][0]
        text, data = texts_of(choice["logprobs"]["content"])
        assert text == choice["message"]["content"]
        assert data == text or "\ufffd" in data
        tokens, content = [], ""
        for event in server.chat(query, **fields, stream=True).text.split("\n\n"):
            if event.startswith("data: {"):
                part = json.loads(event[6:])["choices"][0]
                content += part["delta"].get("content", "")
                tokens += (part["logprobs"] or {"content": []})["content"]
                assert texts_of(tokens)[0] == content
        assert tokens == choice["logprobs"]["content"]


def test_prompts_of_token_ids(server, reference):
    _, tokenizer = reference
    complete = functools.partial(server.http.post, "/v1/completions")
    ids = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    options = {"temperature": 0, "max_tokens": 12}
    whole = complete(json={"prompt": "Hello", **options}).json()
    for prompt in (ids, tokenizer("Hello")["input_ids"]):
        reply = complete(json={"prompt": prompt, **options}).json()
        assert reply["choices"] == whole["choices"]
        assert reply["usage"] == whole["usage"]
    several = complete(json={"prompt": [ids, tokenizer("你好")["input_ids"]], **options, "echo": True}).json()
    assert several["choices"][0]["text"] == "Hello" + whole["choices"][0]["text"]
    assert several["choices"][1]["text"].startswith("你好")
    echoed = complete(json={"prompt": "Hello", **options, "echo": True}).json()
    assert echoed["choices"][0]["text"] == "Hello" + whole["choices"][0]["text"]
    stream = complete(json={"prompt": "Hello", **options, "echo": True, "stream": True}).text
    parts = [json.loads(event[6:]) for event in stream.split("\n\n") if event.startswith("data: {")]
    assert "".join(part["choices"][0]["text"] for part in parts) == echoed["choices"][0]["text"]


def test_an_answer_goes_on_behind_sop(server, reference):
    """Its first token may have a space in front, and what was there is not given again."""
    _, tokenizer = reference
    prompt = tokenizer("Hello")["input_ids"]
    answer = server.http.post("/v1/completions", json={"prompt": prompt, "temperature": 0}).json()["choices"][0]["text"]
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    for cut in (1, 2, len(ids) // 2):
        body = {"prompt": prompt + ids[:cut], "temperature": 0}
        rest = server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert tokenizer.decode(ids[:cut]) + rest == answer
        text = server.http.post("/v1/completions", json={**body, "echo": True}).json()["choices"][0]["text"]
        assert text.endswith(answer)


def test_scores_of_a_prompt(server, reference):
    """As evaluation harnesses ask for them, and as the model gives them: from <sop> on, else not at all."""
    model, tokenizer = reference
    bos = tokenizer.bos_token_id
    prompts = []
    for query, answer in (("Hello", "Hello! I am a very small model."), ("你好", "你好！")):
        prompts.append(tokenizer(query)["input_ids"] + tokenizer(answer, add_special_tokens=False)["input_ids"])
    body = {"prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    reply = server.http.post("/v1/completions", json=body).json()
    for ids, choice in zip(prompts, reply["choices"], strict=True):
        scored = choice["logprobs"]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
        start = ids.index(bos) + 1
        assert scored["token_logprobs"][:start] == scored["top_logprobs"][:start] == [None] * start
        for column in range(start, len(ids)):
            assert scored["token_logprobs"][column] == pytest.approx(float(logprobs[column - 1, ids[column]]), abs=1e-4)
            ((_, best),) = scored["top_logprobs"][column].items()
            assert best == pytest.approx(float(logprobs[column - 1].max()), abs=1e-4)
        assert "".join(scored["tokens"]) == choice["text"]
        assert len(scored["tokens"]) == len(scored["text_offset"]) == len(ids) + 1
        for offset, token in zip(scored["text_offset"], scored["tokens"], strict=True):
            assert choice["text"][offset : offset + len(token)] == token
    assert reply["usage"]["completion_tokens"] == 2
    alone = server.http.post("/v1/completions", json={**body, "prompt": prompts[0], "max_tokens": 0}).json()
    assert alone["usage"]["completion_tokens"] == 0
    assert alone["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(
        reply["choices"][0]["logprobs"]["token_logprobs"][:-1]
    )
    stream = server.http.post("/v1/completions", json={**body, "stream": True}).text
    parts = [json.loads(event[6:])["choices"][0] for event in stream.split("\n\n") if event.startswith("data: {")]
    for index, choice in enumerate(reply["choices"]):
        mine = [part["logprobs"] for part in parts if part["index"] == index and part["logprobs"]]
        for name in ("tokens", "text_offset"):
            assert [value for logprobs in mine for value in logprobs[name]] == choice["logprobs"][name]
    ended = (
        tokenizer("Hello")["input_ids"]
        + tokenizer("Hello! Ask me something simple.", add_special_tokens=False).input_ids
    )
    scored = server.http.post("/v1/completions", json={**body, "prompt": ended}).json()["choices"][0]
    assert scored["finish_reason"] == "stop"
    assert len(scored["logprobs"]["tokens"]) == len(ended) + 1  # <eop>: harnesses drop the last one
    assert scored["logprobs"]["tokens"][-1] == ""
    assert scored["text"].startswith("Hello[gMASK]<sop>Hello!")
    for prompt in ("Hello", prompts[0][:-1][: prompts[0].index(bos)], tokenizer("Hello")["input_ids"]):
        response = server.http.post("/v1/completions", json={**body, "prompt": prompt})
        assert response.status_code == 400
        assert body_of(response)["param"] == "prompt"
        assert "<sop>" in body_of(response)["message"]
    assert server.http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 0}).status_code == 400


def test_public_form(server, reference):
    """The form of the public api.py, with histories that are shortened as `chat` shortens them."""
    model, tokenizer = reference
    for history, limit in (([], None), ([["Hello", "Hi!"]], None), ([["早上好", "晚上好" * 20]] * 3, 60)):
        body = {"prompt": "你好", "history": history, "temperature": 0}
        if limit:
            body["max_length"] = limit
        reply = server.http.post("/", json=body).json()
        past = [tuple(pair) for pair in history]
        expected, longer = model.chat(tokenizer, "你好", past, max_length=limit or 2048, do_sample=False)
        assert reply["response"] == expected
        assert reply["history"] == [list(pair) for pair in longer]
        assert reply["status"] == 200
        time.strptime(reply["time"], "%Y-%m-%d %H:%M:%S")
    assert server.http.post("/", json={"prompt": "Hello"}).json()["response"]


def test_api_key():
    with Running(api_key="sésame", max_length=40) as running:
        assert running.http.get("/health").json() == {"status": "ok"}
        for given in (None, "Bearer", "Bearer wrong", "Basic sésame", "Bearer sésame2", "Bearer s"):
            headers = {} if given is None else {"Authorization": given.encode()}
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
                response = running.http.get(path, headers=headers)
                assert response.status_code == 401, path
                assert body_of(response)["code"] == "invalid_api_key"
        headers = {"Authorization": "Bearer sésame".encode()}
        assert running.http.get("/v1/models", headers=headers).status_code == 200


def test_hanging_up_frees_the_place(server):
    """Of a stream, of an answer that is awaited as a whole, and of one with several choices."""
    body = {"model": "chatglm", "messages": user("Hello"), "max_tokens": 1500, "min_tokens": 1500}
    for fields in ({"stream": True}, {"stream": True, "n": 3}, {}):
        content = json.dumps({**body, **fields}).encode()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content)
            end = time.monotonic() + 20
            while server.scheduler.running < fields.get("n", 1):
                assert time.monotonic() < end
                time.sleep(0.01)
            if fields:
                assert connection.recv(100)
        server.wait_until_empty()
        for _ in range(3):  # at once, before anything has begun
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        time.sleep(0.5)
        server.wait_until_empty()


def test_full_queue_is_429(small_server):
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda _: small_server.chat("Hello", **LONG), range(12)))
    statuses = [reply.status_code for reply in replies]
    assert set(statuses) == {200, 429}
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert refused.headers["Retry-After"] == "1"
    assert body_of(refused)["type"] == "rate_limit_error"
    assert len({reply.text.split('"content"')[1] for reply in replies if reply.status_code == 200}) == 1
    small_server.wait_until_empty()


def test_time_limit_of_a_request(server, monkeypatch):
    monkeypatch.setattr(server.scheduler, "time_limit", 0.3)
    response = server.chat("Hello", min_tokens=1000)
    assert response.status_code == 408
    assert body_of(response)["code"] == "time_limit"
    events = server.chat("Hello", min_tokens=1000, stream=True).text.strip().split("\n\n")
    assert "time_limit" in events[-1]  # and no [DONE]
    server.wait_until_empty()


def test_a_failure_inside_is_500_without_details(monkeypatch):
    with Running(max_length=40) as running:

        def fail(*_):
            raise RuntimeError(f"broken at {ROOT}")

        monkeypatch.setattr(Prompts, "of_chat", fail)
        response = running.chat()
        assert response.status_code == 500
        assert body_of(response)["type"] == "server_error"
        monkeypatch.undo()
        monkeypatch.setattr(running.scheduler, "_step", fail)
        assert body_of(running.chat(max_tokens=5))["type"] == "server_error"
        for _ in range(2):
            assert running.chat(max_tokens=5).status_code == 503
        assert running.http.get("/health").status_code == 503


def test_an_empty_key_of_the_environment_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("CHATGLM_API_KEY", "")
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve"])
    assert ended.value.code == 2
    assert "the key is empty" in capsys.readouterr().err


def test_request_ids(small_server, caplog):
    """Those that come are kept, unless they could spoil a log."""
    with caplog.at_level("INFO", "chatglm.access"):
        kept = small_server.http.get("/health", headers={"X-Request-Id": "abc-1"})
        made = [
            small_server.http.get("/nothing", headers={"X-Request-Id": bad}) for bad in ("a b", "x" * 200, "é".encode())
        ]
        plain = small_server.http.get("/health")
    assert kept.headers["x-request-id"] == "abc-1"
    assert all(len(reply.headers["x-request-id"]) == 32 for reply in (*made, plain))
    formatter = log.JsonFormatter()
    lines = [json.loads(formatter.format(record)) for record in caplog.records if record.name == "chatglm.access"]
    assert [line["request_id"] for line in lines] == [r.headers["x-request-id"] for r in (kept, *made, plain)]
    assert [line["status"] for line in lines] == [200, 404, 404, 404, 200]


def test_a_log_has_one_line_for_each_event(small_server, caplog):
    with caplog.at_level("INFO", "chatglm.access"):
        small_server.http.get("/a%0d%0aINFO: forged")
    records = [record for record in caplog.records if record.name == "chatglm.access"]
    assert len(records) == 1
    assert "\n" not in records[0].getMessage() + log.JsonFormatter().format(records[0])


def test_tokenize(small_server, reference):
    _, tokenizer = reference
    text = "Hello [gMASK] <sop> 你好"
    got = small_server.http.post("/tokenize", json={"prompt": text}).json()
    assert got["tokens"] == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert (got["count"], got["max_model_len"]) == (len(got["tokens"]), 40)
    assert small_server.http.post("/detokenize", json={"tokens": got["tokens"]}).json() == {
        "prompt": tokenizer.decode(got["tokens"])
    }
    chat = small_server.http.post("/tokenize", json={"messages": user("Hello")}).json()["tokens"]
    assert chat == tokenizer.apply_chat_template(user("Hello"), add_generation_prompt=True, return_dict=False)
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": user("b")}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": [-1]}),
    ):
        response = small_server.http.post(path, json=body)
        assert response.status_code == 400
        body_of(response)


def test_paths_that_are_not_there_name_those_that_are(small_server):
    for path in ("/v1/responses", "/v1/embeddings"):
        response = small_server.http.post(path, json={"input": "Hello"})
        assert response.status_code == 404
        assert "/v1/chat/completions" in body_of(response)["message"]


def test_ready_and_live(small_server, monkeypatch):
    for path in ("/health/live", "/health/ready"):
        assert small_server.http.get(path).json() == {"status": "ok"}
    monkeypatch.setattr(type(small_server.scheduler), "places", 0)
    assert small_server.http.get("/health/live").status_code == 200
    response = small_server.http.get("/health/ready")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert body_of(response)["code"] == "not_ready"


def test_encoding_has_a_queue_and_a_time_limit(small_server, monkeypatch):
    """And nothing is encoded for those who have hung up."""
    started, go, encoded = threading.Event(), threading.Event(), []

    def slow(*_):
        encoded.append(1)
        started.set()
        assert go.wait(30)
        raise ValueError("slow")

    monkeypatch.setattr(Prompts, "of_chat", slow)
    host, port = small_server.url.removeprefix("http://").split(":")
    content = json.dumps({"messages": user("Hello")}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(small_server.chat)
        assert started.wait(30)
        waiting = small_server.app.state.service._one_encoder.statistics
        for count in (1, 2):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
                while waiting().tasks_waiting < count:
                    time.sleep(0.01)
        others = [pool.submit(small_server.chat) for _ in range(5)]
        while sum(other.done() for other in others) < 3:
            time.sleep(0.01)
        go.set()
        assert first.result().status_code == 400
        statuses = sorted(other.result().status_code for other in others)
    assert statuses == [400, 400, 429, 429, 429]
    assert len(encoded) == 3


def test_connections_that_send_nothing_are_closed(small_server, monkeypatch):
    """Whether they have sent a part of a request or none; an answer under way is left alone."""
    host, port = small_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as idle, socket.create_connection((host, int(port))) as slow:
        slow.sendall(b"POST / HTTP/1.1\r\nHost: loc")
        time.sleep(0.2)
        small_server.http.get("/health")
        monkeypatch.setattr(connections, "HEAD_SECONDS", 0)
        for connection in (idle, slow):
            connection.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(10) == b""
    assert small_server.http.get("/health").status_code == 200


def test_of_too_many_connections_the_oldest_idle_one_is_closed(small_server, monkeypatch):
    host, port = small_server.url.removeprefix("http://").split(":")
    monkeypatch.setattr(connections.Connection, "most", 20)
    with contextlib.ExitStack() as opened:
        idle = [opened.enter_context(socket.create_connection((host, int(port)))) for _ in range(60)]
        assert httpx.get(small_server.url + "/health").status_code == 200
        assert len(small_server.server.server_state.connections) <= 21
        idle[0].settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert idle[0].recv(10) == b""


def test_many_headers_are_refused(small_server):
    host, port = small_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
            for index in range(100):
                connection.sendall(b"X-%d: %b\r\n" % (index, b"x" * 10_000))
        with contextlib.suppress(ConnectionError):
            assert connection.recv(100).split(b"\r\n")[0] in (b"HTTP/1.1 400 Bad Request", b"HTTP/1.1 400 ", b"")
    assert small_server.http.get("/health").status_code == 200


def test_a_client_that_reads_nothing_is_cut_off(monkeypatch):
    """Its answers end, and it does not keep the server from ending."""
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.2)
    paused, made = threading.Event(), connections.Connection.connection_made
    pause = connections.Connection.pause_writing

    def with_little_room(connection, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(connection, transport)

    monkeypatch.setattr(connections.Connection, "connection_made", with_little_room)
    monkeypatch.setattr(connections.Connection, "pause_writing", lambda self: (paused.set(), pause(self)))
    with Running(max_length=2000, max_batch=1) as running:
        host, port = running.url.removeprefix("http://").split(":")
        body = {"prompt": "Hello", "n": 1, "stream": True, "logprobs": 5, "max_tokens": 1900, "ignore_eos": True}
        content = json.dumps(body).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
            assert paused.wait(60)
            running.wait_until_empty(30)


def test_answers_are_broken_off_at_the_end_of_the_drain():
    """Clients are told."""
    with Running(drain=0.2) as running:
        with running.http.stream(
            "POST", CHAT, json={"messages": user("Hello"), "stream": True, **LONG, **HOURS}
        ) as reply:
            lines = reply.iter_lines()
            next(lines)
            running.server.should_exit = True
            rest = [line for line in lines if line]
        assert "shutting down" in rest[-1]


def test_metrics_in_their_form(small_server):
    """Read by the parser of Prometheus: histograms of what operators look at, and refusals by cause."""
    small_server.chat("Hello", max_tokens=5)
    small_server.chat("Hello", temperature=9)
    families = {
        family.name: family for family in text_string_to_metric_families(small_server.http.get("/metrics").text)
    }
    for name in (
        *("first_text_seconds", "answer_seconds", "queue_seconds", "gap_seconds"),
        *("batch_answers", "answer_tokens", "request_prompt_tokens"),
    ):
        samples = {sample.name: sample.value for sample in families[f"chatglm_{name}"].samples}
        assert samples[f"chatglm_{name}_count"] > 0, name
    causes = {sample.labels["cause"]: sample.value for sample in families["chatglm_refusals"].samples}
    assert causes["invalid_request_error"] > 0


def test_open_metrics():
    with Running(api_key="secret", open_metrics=True, max_length=40) as running:
        assert running.http.get("/metrics").status_code == 200
        assert running.http.get("/v1/models").status_code == 401


def test_metrics(small_server):
    def shown() -> dict[str, float]:
        text = small_server.http.get("/metrics").text
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    small_server.chat("Hello", max_tokens=5)  # makes the counters with labels
    before = shown()
    usage = small_server.chat("Hello", max_tokens=5).json()["usage"]
    after = shown()
    added = {name: value - before.get(name, 0) for name, value in after.items()}
    assert added[f'chatglm_requests_total{{path="{CHAT}",status="200"}}'] == 1
    assert added["chatglm_prompt_tokens_total"] == usage["prompt_tokens"] > 0
    assert added["chatglm_tokens_total"] == usage["completion_tokens"] > 0
    assert added["chatglm_first_text_seconds_count"] == added["chatglm_answer_seconds_count"] == 1
    assert 0 < added["chatglm_first_text_seconds_sum"] <= added["chatglm_answer_seconds_sum"]
    assert after["chatglm_running"] == after["chatglm_waiting"] == 0


def mutated(generator: random.Random) -> bytes:
    """A valid body, damaged: values replaced, keys added or gone, bytes flipped."""
    odd = [
        None,
        True,
        -1,
        0,
        2,
        1e308,
        -(2**70),
        "",
        "chatglm",
        "\ud800",
        "\x00",
        "<eop>",
        [],
        {},
        [[]],
        "a" * 300,
        ["x"],
    ]
    body = {
        "model": "chatglm",
        "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "你好"}],
        "max_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.5,
        "n": 1,
        "seed": 3,
        "stop": ["x"],
        "logprobs": True,
        "top_logprobs": 2,
        "stream": generator.random() < 0.3,
    }

    def damage(value):
        choice = generator.random()
        if isinstance(value, dict) and value and choice < 0.9:
            key = generator.choice(list(value))
            if choice < 0.1:
                return {name: item for name, item in value.items() if name != key}
            if choice < 0.2:
                return {**value, generator.choice(["tools", "x", "\ud800", "echo", "user"]): generator.choice(odd)}
            return {**value, key: damage(value[key])}
        if isinstance(value, list) and value and choice < 0.8:
            index = generator.randrange(len(value))
            return [*value[:index], damage(value[index]), *value[index + generator.randint(0, 1) :]]
        return generator.choice(odd)

    for _ in range(generator.randint(1, 3)):
        body = damage(body)
    content = bytearray(json.dumps(body).encode())
    if generator.random() < 0.2:
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
    return bytes(content[: generator.randrange(len(content))] if generator.random() < 0.05 else content)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_bodies(small_server, count):
    """Whatever comes: no 5xx, no hang, errors in their form."""
    generator = random.Random(count)
    statuses: dict[int, int] = {}
    for _ in range(count):
        content = mutated(generator)
        path = generator.choice([CHAT, CHAT, "/v1/completions", "/"])
        response = small_server.http.post(
            path, content=content, headers={"content-type": "application/json"}, timeout=20
        )
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code < 500, content
        if response.status_code != 200:
            body_of(response)
    assert statuses[200] > count / 100
    assert statuses[400] > count / 4
    small_server.wait_until_empty()


@pytest.mark.parametrize("examples", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_schemathesis(small_server, examples):
    """Requests made from the server's own description: no server errors, replies as described."""
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(f"{small_server.url}/openapi.json")
    count = 0
    for operation in schema.get_all_operations():

        @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def check(case):
            case.call_and_validate(
                timeout=300,
                checks=[
                    schemathesis.checks.not_a_server_error,
                    schemathesis.checks.CHECKS.get_one("response_schema_conformance"),
                    schemathesis.checks.CHECKS.get_one("content_type_conformance"),
                ],
            )

        given(case=operation.ok().as_strategy())(check)()
        count += 1
    assert count == 11


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_command_and_sigterm(tmp_path):
    """The command of the README; SIGTERM lets the running answer finish, takes no more, and ends with 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "chatglm_int8.apps", "serve", "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 120
        while True:
            try:
                assert httpx.get(url + "/health").status_code == 200
                break
            except httpx.TransportError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.1)
        body = {"model": "chatglm", "messages": user("Hello"), "max_tokens": 100, "min_tokens": 100, "stream": True}
        with httpx.stream("POST", url + CHAT, json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            end = time.monotonic() + 30
            with pytest.raises(httpx.TransportError):
                while time.monotonic() < end:
                    httpx.get(url + "/health")
                    time.sleep(0.05)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason": "length"' in rest[-2]
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_twice_ends_the_scheduler_before_the_interpreter(tmp_path):
    """In the middle of an answer. A thread that still computes then aborts the process now and then."""
    script = """
import atexit, os, signal, sys, threading, time
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))
from chatglm_int8.apps import cli
from chatglm_int8.apps.server.scheduler import Scheduler
import httpx
step = Scheduler._step
def interrupting(scheduler):
    Scheduler._step = step
    os.kill(os.getpid(), signal.SIGINT)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
Scheduler._step = interrupting
def ask():
    body = {"messages": [{"role": "user", "content": "Hello"}], "min_tokens": 1900}
    while True:
        try:
            httpx.post("http://127.0.0.1:" + sys.argv[-1] + "/v1/chat/completions", json=body, timeout=60)
        except httpx.ConnectError:
            time.sleep(0.1)
        except httpx.HTTPError:
            return
threading.Thread(target=ask, daemon=True).start()
sys.exit(cli.main(sys.argv[1:]))
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ended = subprocess.run(
        [sys.executable, "-c", script, "serve", "--device", "cpu", "--port", str(port)],
        capture_output=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert ended.returncode == 0, ended
    assert "MainThread" in ended.stdout
    assert "scheduler" not in ended.stdout
    assert "Traceback" not in ended.stderr


def test_arguments_of_the_command(capsys, monkeypatch, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    assert cli.main(["serve", "--model", str(tmp_path / "nowhere")]) == 1
    signal.signal(signal.SIGTERM, handler)
    assert capsys.readouterr().err.count("\n") == 1
    for wrong in (
        ["--max-batch", "0"],
        ["--time-limit", "-1"],
        ["--time-limit", "nan"],
        ["--dtype", "int8"],
        ["--cors-origin", "chat.example.org"],
        ["--cors-origin", "https://chat.example.org/page"],
        ["--api-key", ""],
        ["--api-key", " "],
        ["--drain", "0"],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["serve", *wrong])
        assert ended.value.code == 2
        assert wrong[0] in capsys.readouterr().err
