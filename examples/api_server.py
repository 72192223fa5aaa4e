"""Serves a ChatGLM model over HTTP, in the form of OpenAI's API and in that of ChatGLM-6B's public api.py.

    python examples/api_server.py [--model FOLDER] [--device DEVICE] [--port 8000] [--api-key KEY]

POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /health, GET /metrics (Prometheus), and POST / with
`{"prompt", "history", "max_length", "top_p", "temperature"}`. Requests are decoded together (see batching.py). SIGTERM
lets running answers finish. The default model is the small one in this checkout.

Arguments that are left out are those of `model.chat`: temperature 0.95, top_p 0.7, top_k 50. Arguments that ask for
what the model can't do (tools, images, response formats) are refused by name; values that ask for nothing are taken.
"""

import argparse
import asyncio
import bisect
import collections
import contextlib
import dataclasses
import hmac
import itertools
import json
import logging
import os
import re
import signal
import sys
import time
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

try:
    import anyio
    import batching
    import cli_demo
    import prometheus_client as prometheus
    import uvicorn
    from batching import Answer, AnswerText, Busy, Failed, Sampling, Scheduler, TimeLimit, Token, TokenTexts, arrival
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import PlainTextResponse, Response, StreamingResponse
    from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware

    from chatglm_int8.tokenization_chatglm import BYTES, WHITE_SPACE
except ModuleNotFoundError as error:
    sys.exit(f'{error}. Install the server first: pip install ".[serve]"   (in the folder above examples)')

logger = logging.getLogger("chatglm")

ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
FINISHED = re.compile(r"\[gMASK\] ?<sop>")  # in a prompt that apply_chat_template has rendered
LOWEST = -9999.0  # log-probability: JSON has no infinity
KEEP_ALIVE = 75  # seconds: longer than the 60 of proxies and the pauses of a person
BODY_SECONDS = 30  # for a client to send its body
NO_JSON = "The body is not JSON in UTF-8, or has numbers or nesting beyond reason."


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server is started with; the command line has the same names."""

    model: str = str(cli_demo.ROOT)
    device: str | None = None
    dtype: str = "auto"
    name: str = "chatglm"
    api_key: str | None = None
    max_batch: int = batching.MAX_BATCH
    max_queue: int = 64
    max_length: int | None = None
    max_body: int = 1 << 18
    time_limit: float = 300.0
    cors_origin: Sequence[str] = ()


# What clients send. Null stands for an argument that is left out.

# Arguments that this server doesn't have, with values that ask for nothing. So do null, false, "", [] and {}.
IDLE: dict[str, tuple] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "length_penalty": (1,),
    "min_p": (0,),
    "modalities": (["text"],),
    "num_beams": (1,),
    "priority": (0,),
    "prompt_logprobs": (0,),
    "reasoning_effort": ("none",),
    "repeat_penalty": (1,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "tool_choice": ("none", "auto"),
    "typical_p": (1,),
    "verbosity": ("medium",),
}


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether an argument that this server doesn't have can be dropped."""
    if name == "logit_bias" and isinstance(value, dict):
        return not any(value.values())
    return value is None or value is False or value in ("", [], {}) or value in IDLE.get(name, ())


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    ignored: ClassVar[frozenset[str]] = frozenset()  # arguments that are taken and not used

    @model_validator(mode="before")
    @classmethod
    def _without_idle_arguments(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if (value is not None if name in cls.model_fields else not cls._is_idle(name, value))
        }

    @classmethod
    def _is_idle(cls, name: str, value: Any) -> bool:
        return name in cls.ignored or asks_for_nothing(name, value)


class TextPart(Form):
    ignored = frozenset({"annotations", "cache_control"})

    type: Literal["text"]
    text: str


def _given(content: Any) -> Any:
    if content is None:
        raise ValueError("a message needs its text, and has none (null). Give the text, or leave the message out")
    return content


class Message(Form):
    ignored = frozenset({"annotations", "cache_control", "id", "name", "reasoning", "reasoning_content", "refusal"})

    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer is system.")
    content: Annotated[str | list[TextPart], BeforeValidator(_given)] = Field(None, validate_default=True)


class StreamOptions(Form):
    ignored = frozenset({"include_obfuscation"})

    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="With include_usage: usage so far in every event.")


class SamplingForm(Form):
    ignored = frozenset(
        {
            "cache_prompt",
            "metadata",
            "parallel_tool_calls",
            "prompt_cache_key",
            "prompt_cache_retention",
            "request_id",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
        }
    )

    model: str | None = Field(None, description="The name of the model, if at all.")
    temperature: float = Field(0.95, ge=0, le=2, description="0 takes the likeliest token each time.")
    top_p: float = Field(0.7, ge=0, le=1)
    top_k: int = Field(50, ge=0, description="0 or -1: none. Not in OpenAI's API; the default is that of model.chat.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**64, description="Choice i of n has seed + i.")
    n: int = Field(1, ge=1, le=8)
    stop: str | list[str] = Field([], max_length=64, description="Up to 64 strings that end the answer.")
    max_tokens: int | None = Field(None, ge=1, description="-1, or more than there is room for: all the room.")
    min_tokens: int = Field(0, ge=0, description="The model does not end before. Not in OpenAI's API.")
    ignore_eos: bool = Field(False, description="The answer ends at max_tokens. Not in OpenAI's API.")
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_one_form(cls, data: Any) -> Any:
        """A stop string as a list; what other servers take for "no limit" as it is written here."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if isinstance(data.get("stop"), str):
            data["stop"] = [data["stop"]] if data["stop"] else []
        for name, unlimited in (("max_tokens", None), ("max_completion_tokens", None), ("top_k", 0)):
            if data.get(name) == -1:
                data[name] = unlimited
        if data.get("best_of") == data.get("n", 1):
            data.pop("best_of", None)
        return data

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def reported(self) -> int | None:
        """How many likeliest tokens to report beside each token; None: nothing."""
        return None

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's tokens are reported, too."""
        return False


class ChatForm(SamplingForm):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def reported(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionForm(SamplingForm):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text, or its token ids, or several of either. Ids with `<sop>` are taken as they are."
    )
    max_tokens: int | None = Field(None, ge=0, description="-1, or more than there is room for: all the room.")
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = Field(False, description="Give the prompt before the answer.")

    @model_validator(mode="before")
    @classmethod
    def _without_false(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("logprobs") is False:
            return {**data, "logprobs": None}
        return data

    @property
    def reported(self) -> int | None:
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.logprobs is not None


class PublicForm(Form):
    prompt: str
    history: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = []
    max_length: int = Field(2048, ge=1)
    top_p: float = Field(0.7, ge=0, le=1)
    temperature: float = Field(0.95, ge=0)


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorBody


# Errors, in OpenAI's form whatever happens


class ApiError(Exception):
    """An answer that is an error. The message goes to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = headers
        kinds = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def to_json(body: dict | str) -> bytes:
    # A client can send half a surrogate pair as an escape; quoted in an error, it has no UTF-8.
    return ENCODER.encode(body).encode("utf-8", "replace")


def json_response(body: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(body), status, headers, media_type="application/json")


def event(body: dict) -> bytes:
    """One event of a stream."""
    return b"data: " + to_json(body) + b"\n\n"


def as_api_error(error: Exception, request: Request | None = None) -> ApiError:
    """What a client is told about any exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        # Of what may be a text or a list, both are reported: the deeper mistake is that of the form that was meant.
        mistake = max(error.errors(), key=lambda mistake: len(mistake["loc"]))
        kind, names = mistake["type"], [str(part) for part in mistake["loc"][1:]]  # the first is "body" or "path"
        if kind == "string_type" and names[-1:] == ["str"]:
            names.pop()
        param = ".".join(name for name in names if not name.startswith("list["))[:200] or None
        if kind == "extra_forbidden":
            told = f"{param} is no argument of this server, or asks for what this model can't do: leave it out."
            return ApiError(400, told, param, "unknown_parameter")
        if kind == "json_invalid":
            return ApiError(400, NO_JSON)
        if kind == "model_attributes_type":
            how = "" if param else ", sent with Content-Type: application/json"
            return ApiError(400, f"{param or 'The body'} has to be a JSON object{how}.", param)
        return ApiError(400, f"{param or 'The body'}: {mistake['msg'].removeprefix('Value error, ')}.", param)
    if isinstance(error, Busy):
        return ApiError(
            429,
            "The server is busy: its queue is full. Try again in a moment.",
            code="busy",
            headers={"Retry-After": "1"},
        )
    if isinstance(error, TimeLimit):
        return ApiError(408, str(error), code="time_limit", headers={"x-should-retry": "false"})
    if isinstance(error, Failed):
        return ApiError(503, str(error))
    if isinstance(error, HTTPException):
        if error.status_code in (404, 405) and request is not None:
            where = f"{request.method} {request.url.path[:200]}"
            what = "There is no such path" if error.status_code == 404 else "The method does not fit the path"
            return ApiError(error.status_code, f"{what}: {where}.", headers=error.headers)
        return ApiError(error.status_code, NO_JSON if error.status_code == 400 else str(error.detail))
    return ApiError(500, "The server failed to answer this request.")


class Gate:
    """ASGI middleware around everything: the key, the size of bodies, and the count of requests.

    HEAD is answered as GET, whose body the HTTP server leaves out, and a slash at the end of a path is dropped.
    """

    def __init__(self, app, settings: Settings, requests: prometheus.Counter):
        self.app = app
        self.requests = requests
        self.limit = settings.max_body
        self.key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        scope = {**scope, "method": method, "path": scope["path"].rstrip("/") or "/"}
        status = 499  # hung up

        async def counting(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, counting)
        except Exception as error:  # past here, the connection would be closed too
            logger.exception("A request failed")
            if status != 499:
                raise
            await as_api_error(error).response()(scope, receive, counting)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.requests.labels(path, str(status)).inc()

    async def _pass(self, scope, receive, send) -> None:
        headers = dict(scope["headers"])
        if self.key is not None and scope["path"] != "/health":
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(given, self.key) or scheme.lower() != b"bearer":
                error = ApiError(
                    401,
                    "Incorrect API key: send it as Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        except asyncio.TimeoutError:
            error = ApiError(408, f"The body did not arrive within {BODY_SECONDS} seconds.")
            await error.response()(scope, receive, send)
            return
        if body is None:
            return
        first = {"type": "http.request", "body": body, "more_body": False}

        async def replay():
            nonlocal first
            message, first = first, None
            return message if message is not None else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive) -> bytes | None:
        """The whole body, None if the client hung up."""
        body, size, more = bytearray(), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            if size <= self.limit:
                body += message.get("body", b"")
            elif size > 16 * self.limit:
                break  # else the rest is read and dropped: a client that is still sending misses the reply
            more = message.get("more_body", False)
        if size > self.limit:
            raise ApiError(413, f"The body is larger than {self.limit} bytes.", code="body_too_large")
        return bytes(body)


# Answers


@dataclasses.dataclass
class Piece:
    """A part of choice `index`: text, and the tokens that it is made of. The last one has a finish_reason."""

    index: int
    text: str
    tokens: list[Token]
    finish_reason: str | None = None
    count: int = 0  # of new tokens: those of an echoed prompt are not
    offset: int = 0  # of the text in the choice


@dataclasses.dataclass
class Prompt:
    """Ids to read, and what is given of them before an answer: text, or each token's part of it, or nothing."""

    ids: list[int]
    echo: str = ""
    token_texts: list[str] = dataclasses.field(default_factory=list)
    begun: list[int] = dataclasses.field(default_factory=list)  # ids of the answer, behind `<sop>`

    def echoed(self, index: int, answer: Answer) -> Piece:
        pairs = zip(answer.prompt_tokens, self.token_texts, strict=True)
        return Piece(index, self.echo, [dataclasses.replace(token, text=text) for token, text in pairs])


async def pieces(
    answers: list[Answer], texts: list[AnswerText], prompts: list[Prompt] | None = None, reported: bool = False
) -> AsyncIterator[Piece]:
    """The parts of all answers as they come. Leaving the iteration cancels them.

    What has come while the last part was being sent is one part: who falls behind catches up.

    Args:
        answers, texts: what is decoded, and its text.
        prompts: to give before each answer, if any.
        reported: cut the text where tokens end, and name each token's part of it.
    """
    unreported = [0] * len(answers)  # tokens whose text is still kept back
    tokens = [TokenTexts(text.length) for text in texts]
    unfinished = list(range(len(answers)))
    to_echo = {} if prompts is None else dict(enumerate(prompts))
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
                    yield to_echo.pop(index).echoed(index, answer)
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


class EventStream(StreamingResponse):
    """A stream of events; it cancels its answers however it ends, even before it has begun."""

    def __init__(self, events: AsyncIterator[bytes], answers: list[Answer]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._answers = answers

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            cancel(self._answers)


def cancel(answers: list[Answer]) -> None:
    for answer in answers:
        answer.cancel()


class Service:
    """A model behind the API: encodes what comes in, and puts answers into OpenAI's form."""

    def __init__(self, settings: Settings, scheduler: Scheduler, metrics: "Metrics"):
        self.settings = settings
        self.scheduler = scheduler
        self.metrics = metrics
        self._tokenizer = scheduler.tokenizer
        self._one_encoder = anyio.CapacityLimiter(1)
        self._shortened = False  # a conversation, which is said once

    async def encode(self, param: str, make: Callable[[], Any]) -> Any:
        """Runs an encoding of `param`, which may be long, beside the event loop; its ValueErrors are the client's."""
        try:
            return await anyio.to_thread.run_sync(make, limiter=self._one_encoder)
        except ValueError as error:
            raise ApiError(400, str(error), param) from None

    def chat_prompt(self, form: ChatForm) -> Prompt:
        """The prompt of a conversation, without its oldest rounds if it is too long, as `model.chat` does it.

        System messages stay.
        """
        messages = [message.model_dump() for message in form.messages]
        if messages[-1]["role"] == "assistant":
            raise ValueError('The last message has role "assistant": end with one of role "user".')
        spoken = [index for index, message in enumerate(messages) if message["role"] in ("user", "assistant")]
        rounds = [index for before, index in itertools.pairwise(spoken) if _begins_round(messages, before, index)]

        def encode(first: int) -> list[int]:
            kept = [message for index, message in enumerate(messages) if index >= first or index not in spoken]
            return self._tokenizer.apply_chat_template(kept, add_generation_prompt=True, return_dict=False)

        ids = encode(0)
        limit = self.scheduler.max_length
        if rounds and len(ids) >= limit:
            first = bisect.bisect_left(rounds[:-1], True, key=lambda first: len(encode(first)) < limit)
            ids = encode(rounds[first])
            if not self._shortened:
                logger.warning("A conversation has grown past %d tokens: its oldest rounds are left out.", limit)
            self._shortened = True
        return Prompt(ids)

    def completion_prompt(self, form: CompletionForm, given: str | list[int]) -> Prompt:
        """A text or its ids, with `[gMASK] <sop>` behind them. A prompt that has `<sop>` is taken as it is."""
        bos = self._tokenizer.bos_token_id
        if isinstance(given, str):
            # As a text of its own, not as a query: unless it is a finished prompt, no name is a special token here.
            finished = FINISHED.search(given) is not None
            options = {"add_special_tokens": False, "split_special_tokens": not finished}
            own = self._tokenizer(given, **options)["input_ids"]
        else:
            own = given
        known = len(self._tokenizer)
        if wrong := [token_id for token_id in own if not 0 <= token_id < known]:
            raise ValueError(f"{wrong[0]} is no token id of this model: expected 0 to {known - 1}.")
        start = own.index(bos) + 1 if bos in own else len(own)
        if form.scores_prompt and start == len(own):
            raise ValueError(
                f"echo with logprobs scores the tokens behind <sop> (id {bos}), and there are none: the tokens before "
                "it see each other and can't be scored. Send token ids: context, [gMASK], <sop>, and the text to score."
            )
        ids = own if bos in own else self._tokenizer.build_inputs_with_special_tokens(own)
        begun = own[start:]
        if not form.echo:
            return Prompt(ids, begun=begun)
        if isinstance(given, str) and not form.scores_prompt:
            return Prompt(ids, given, begun=begun)
        # An answer's text starts anew behind <sop>.
        context, answer = self._tokenizer.decode_stream(), self._tokenizer.decode_stream()
        texts = [context.step(token_id) for token_id in own[:start]]
        texts[-1] += context.flush()
        texts += [answer.step(token_id) for token_id in begun]
        return Prompt(ids, "".join(texts), texts if form.scores_prompt else [], begun)

    def samplings(self, form: SamplingForm, prompt: list[int]) -> list[Sampling]:
        """The settings of each choice; checked, as far as one argument depends on others."""
        if form.model not in (None, self.settings.name):
            raise ApiError(
                404,
                f"The model {form.model[:200]!r} does not exist: this server has {self.settings.name!r}.",
                "model",
                "model_not_found",
            )
        if not form.stream and form.stream_options is not None and form.stream_options.include_usage:
            raise ApiError(400, "stream_options is for stream: true alone.", "stream_options")
        if isinstance(form, ChatForm):
            if form.top_logprobs and not form.logprobs:
                raise ApiError(400, "top_logprobs needs logprobs: true.", "top_logprobs")
            if None not in (form.max_tokens, form.max_completion_tokens) and form.max_tokens != form.limit:
                raise ApiError(400, "max_tokens is the old name of max_completion_tokens: give one.", "max_tokens")
        if "" in form.stop:
            raise ApiError(400, "A stop string is empty.", "stop")
        room = self.scheduler.room(prompt)
        if form.limit is not None and form.min_tokens > form.limit:
            raise ApiError(400, "min_tokens is more than max_tokens.", "min_tokens")
        if form.limit == 0 and not form.echo:
            raise ApiError(400, "max_tokens: 0 needs echo: true, else there is nothing to give.", "max_tokens")
        if room < 1:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.scheduler.max_length} tokens, prompt and answer "
                f"together. The prompt has {len(prompt)} tokens.",
                "messages" if isinstance(form, ChatForm) else "prompt",
                "context_length_exceeded",
            )
        limit = room if form.limit is None else min(form.limit, room)
        return [
            Sampling(
                max_new_tokens=limit,
                min_new_tokens=limit if form.ignore_eos else form.min_tokens,
                temperature=form.temperature,
                top_p=form.top_p,
                top_k=form.top_k,
                seed=None if form.seed is None else (form.seed + index) % 2**64,
                presence_penalty=form.presence_penalty,
                frequency_penalty=form.frequency_penalty,
                top_logprobs=form.reported,
                prompt_logprobs=form.scores_prompt,
            )
            for index in range(form.n)
        ]

    async def complete(self, request: Request, form: SamplingForm, prompts: list[Prompt]) -> Response:
        """Answer all prompts, n times each, as a whole or as a stream."""
        is_chat = isinstance(form, ChatForm)
        answers: list[Answer] = []
        places = self.scheduler.max_batch + self.scheduler.max_queue
        if len(prompts) * form.n > places:
            raise ApiError(400, f"{len(prompts)} prompts with n = {form.n} are more than {places} answers.", "prompt")
        wanted = [(prompt.ids, self.samplings(form, prompt.ids)) for prompt in prompts]
        try:
            for ids, samplings in wanted:
                answers += self.scheduler.submit(ids, samplings)
        except Exception:
            cancel(answers)
            raise
        process = self.scheduler.model.process_response if is_chat else None
        of_answers = [prompt for prompt in prompts for _ in range(form.n)]
        texts = [AnswerText(self._tokenizer, process, form.stop, prompt.begun) for prompt in of_answers]
        echoed = None if is_chat or not form.echo else of_answers
        read = sum(len(prompt.ids) for prompt in prompts)
        watched = self.metrics.watch(pieces(answers, texts, echoed, form.reported is not None), read)
        frame = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.settings.name,
        }
        if is_chat:
            frame["object"] = "chat.completion.chunk" if form.stream else "chat.completion"
        if form.stream:
            return EventStream(self._events(form, frame, watched, read), answers)
        whole = [Piece(index, "", []) for index in range(len(answers))]

        async def collect() -> None:
            async with contextlib.aclosing(watched):
                async for piece in watched:
                    whole[piece.index].text += piece.text
                    whole[piece.index].tokens += piece.tokens
                    whole[piece.index].finish_reason = piece.finish_reason
                    whole[piece.index].count += piece.count

        await unless_gone(request, collect(), answers)
        choices = []
        for piece in whole:
            content = {"message": {"role": "assistant", "content": piece.text}} if is_chat else {"text": piece.text}
            choices.append(self._choice(form, piece, content))
        count = sum(piece.count for piece in whole)
        return json_response({**frame, "choices": choices, "usage": usage(read, count)})

    async def _events(self, form: SamplingForm, frame: dict, watched, read: int) -> AsyncIterator[bytes]:
        """The events of a stream, behind a prompt of `read` tokens."""
        is_chat = isinstance(form, ChatForm)
        options = form.stream_options or StreamOptions()
        with_usage = options.include_usage
        counts = with_usage and options.continuous_usage_stats
        count = 0

        def part(piece: Piece) -> bytes:
            text = {"content": piece.text} if piece.text else {}
            content = {"delta": text} if is_chat else {"text": piece.text}
            return event(with_choice(self._choice(form, piece, content)))

        def with_choice(choice: dict) -> dict:
            used = {"usage": usage(read, count) if counts else None} if with_usage else {}
            return {**frame, **used, "choices": [choice]}

        # Most parts of a choice differ in nothing but the text, of which NUL takes the place here.
        around: dict[int, tuple[bytes, bytes]] = {}
        lengths = collections.Counter()
        try:
            async with contextlib.aclosing(watched):
                for index in range(form.n if is_chat else 0):
                    delta = {"delta": {"role": "assistant", "content": ""}}
                    yield event(with_choice(self._choice(form, Piece(index, "", []), delta)))
                async for piece in watched:
                    count += piece.count
                    piece.offset = lengths[piece.index]
                    lengths[piece.index] += len(piece.text)
                    if piece.finish_reason is not None or form.reported is not None or counts:
                        yield part(piece)
                        continue
                    if piece.index not in around:
                        before, _, after = part(Piece(piece.index, "\0", [])).rpartition(to_json("\0"))
                        around[piece.index] = before, after
                    before, after = around[piece.index]
                    yield before + to_json(piece.text) + after
            usage_event = event({**frame, "choices": [], "usage": usage(read, count)}) if with_usage else b""
            yield usage_event + b"data: [DONE]\n\n"
        except Exception as error:
            told = as_api_error(error)
            if told.status == 500:
                logger.exception("A stream failed")
            yield event(told.body)

    def _choice(self, form: SamplingForm, piece: Piece, content: dict) -> dict:
        logprobs = None
        if form.reported is not None and (piece.tokens or piece.finish_reason):
            if isinstance(form, ChatForm):
                logprobs = self._chat_logprobs(piece.tokens)
            else:
                logprobs = self._text_logprobs(piece.tokens, piece.offset)
        return {"index": piece.index, **content, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _token_name(self, token_id: int) -> str:
        """The text of a token that was not chosen; a byte that is no whole character reads bytes:\\xe4."""
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        return f"bytes:\\x{BYTES[name]:02x}" if name in BYTES else WHITE_SPACE.get(name, name.replace("▁", " "))

    def _top(self, token: Token) -> list[tuple[int, str, float]]:
        """Ids, names and log-probabilities of the likeliest tokens in the place of one."""
        return [(i, token.text if i == token.id else self._token_name(i), max(x, LOWEST)) for i, x in token.top]

    def _chat_logprobs(self, tokens: list[Token]) -> dict:
        def entry(token_id: int, text: str, logprob: float) -> dict:
            name = self._tokenizer.convert_ids_to_tokens(token_id)
            data = [BYTES[name]] if name in BYTES else list(text.encode())
            return {"token": text, "logprob": max(logprob, LOWEST), "bytes": data}

        content = [
            {**entry(token.id, token.text, token.logprob), "top_logprobs": [entry(*top) for top in self._top(token)]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, tokens: list[Token], offset: int) -> dict:
        """Null stands for the log-probabilities of a context, whose tokens see each other."""
        likeliest = []
        for token in tokens:
            names: dict[str, float] = {}
            for _, name, logprob in self._top(token):
                names.setdefault(name, logprob)  # two ids may have one text
            likeliest.append(None if token.logprob is None else names)
        lengths = [len(token.text) for token in tokens]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [None if token.logprob is None else max(token.logprob, LOWEST) for token in tokens],
            "top_logprobs": likeliest,
            "text_offset": list(itertools.accumulate(lengths[:-1], initial=offset)) if tokens else [],
        }


def _begins_round(messages: list[dict], before: int, index: int) -> bool:
    return messages[index]["role"] == "user" and messages[before]["role"] == "assistant"


def usage(read: int, count: int) -> dict:
    return {"prompt_tokens": read, "completion_tokens": count, "total_tokens": read + count}


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


def load(settings: Settings) -> Scheduler:
    """The model at work. Raises OSError or ValueError with what is wrong."""
    model, tokenizer = cli_demo.load(settings.model, settings.device, settings.dtype)
    return Scheduler(model, tokenizer, settings.max_batch, settings.max_queue, settings.max_length, settings.time_limit)


def create_app(settings: Settings, scheduler: Scheduler | None = None) -> FastAPI:
    """The server as an ASGI application; without a scheduler, it loads the model when it starts up."""
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal scheduler
        scheduler = scheduler or await asyncio.to_thread(load, settings)
        app.state.service = Service(settings, scheduler, metrics)
        metrics.running.set_function(lambda: scheduler.running)
        metrics.waiting.set_function(lambda: scheduler.waiting)
        yield
        await asyncio.to_thread(scheduler.close)

    # The pages of FastAPI's documentation come from elsewhere on the internet; /openapi.json does not.
    app = FastAPI(
        title="ChatGLM",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"default": {"model": ErrorReply, "description": "An error"}},
    )
    app.add_middleware(Gate, settings=settings, requests=metrics.requests)
    if settings.cors_origin:  # outside of the gate: a preflight has no key
        everything: dict[str, list[str]] = {"allow_methods": ["*"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.cors_origin), **everything)

    async def on_error(request: Request, error: Exception) -> Response:
        return as_api_error(error, request).response()

    for kind in (ApiError, HTTPException, RequestValidationError, Busy, TimeLimit, Failed):
        app.add_exception_handler(kind, on_error)

    @app.post("/v1/chat/completions")
    async def chat_completions(form: ChatForm, request: Request):
        service: Service = app.state.service
        prompt = await service.encode("messages", lambda: service.chat_prompt(form))
        return await service.complete(request, form, [prompt])

    @app.post("/v1/completions")
    async def completions(form: CompletionForm, request: Request):
        service: Service = app.state.service
        alone = isinstance(form.prompt, str) or (form.prompt and isinstance(form.prompt[0], int))
        given = [form.prompt] if alone else form.prompt
        if not all(given) or not given:
            raise ApiError(400, "There is no prompt, or an empty one.", "prompt")
        prompts = await service.encode("prompt", lambda: [service.completion_prompt(form, one) for one in given])
        return await service.complete(request, form, prompts)

    def model_card() -> dict:
        return {"id": settings.name, "object": "model", "created": 0, "owned_by": "chatglm-int8"}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        if name != settings.name:
            raise ApiError(404, f"The model {name[:200]!r} does not exist.", "model", "model_not_found")
        return model_card()

    @app.get("/health")
    async def health():
        if not app.state.service.scheduler.healthy:
            raise ApiError(503, "The model does not compute any more: restart the server.")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics():
        return PlainTextResponse(
            prometheus.generate_latest(metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST
        )

    @app.post("/")
    async def public(form: PublicForm, request: Request):
        """The form of ChatGLM-6B's public api.py. The oldest rounds of a long history are left out."""
        service: Service = app.state.service
        scheduler = service.scheduler
        limit = min(form.max_length, scheduler.max_length)
        history = [tuple(pair) for pair in form.history]
        model, tokenizer = scheduler.model, scheduler.tokenizer
        inputs = await service.encode("prompt", lambda: model.build_inputs(tokenizer, form.prompt, history, limit))
        prompt = inputs["input_ids"][0].tolist()
        sampling = Sampling(limit - len(prompt), temperature=form.temperature, top_p=form.top_p)
        answers = scheduler.submit(prompt, [sampling])
        texts = [AnswerText(tokenizer, model.process_response)]
        watched = metrics.watch(pieces(answers, texts), len(prompt))

        async def collect() -> str:
            async with contextlib.aclosing(watched):
                return "".join([piece.text async for piece in watched])

        response = await unless_gone(request, collect(), answers)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        history = [*form.history, [form.prompt, response]]
        return json_response({"response": response, "history": history, "status": 200, "time": now})

    return app


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `Settings`."""
    default = Settings()
    cli_demo.add_model_arguments(parser)
    parser.add_argument("--name", default=default.name, help="the model's name in the API (default: %(default)s)")
    batching.add_arguments(parser)
    parser.add_argument(
        "--max-queue", type=cli_demo.positive(int), default=default.max_queue, help="answers that may wait"
    )
    parser.add_argument("--max-body", type=cli_demo.positive(int), default=default.max_body, help="bytes of a request")
    parser.add_argument(
        "--time-limit", type=cli_demo.positive(float), default=default.time_limit, help="seconds of a request"
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("CHATGLM_API_KEY") or None,
        help="ask clients for this key (default: the environment's CHATGLM_API_KEY, which other users can't list)",
    )

    parser.add_argument(
        "--cors-origin",
        type=origin,
        action="extend",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help='let pages of these origins use the API, such as https://chat.example.org, or "*" (default: none)',
    )


def add_address_arguments(parser: argparse.ArgumentParser) -> None:
    """Where and how the API is reached: --host, --port and --keep-alive."""
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all networks (default: %(default)s)")
    parser.add_argument("--port", type=cli_demo.port, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--keep-alive",
        type=cli_demo.positive(int),
        default=KEEP_ALIVE,
        metavar="SECONDS",
        help="close connections that are idle for longer (default: %(default)s)",
    )


def origin(text: str) -> str:
    """An origin as browsers write it, of an argument's text."""
    if text == "*":
        return text
    parts = urllib.parse.urlsplit(text)
    if not parts.scheme or not parts.netloc or parts.path.strip("/") or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f'{text!r} is no origin: expected scheme://host or scheme://host:port, or "*"')
    return f"{parts.scheme}://{parts.netloc}".lower()


def settings_of(arguments: argparse.Namespace) -> Settings:
    return Settings(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)})


class HttpServer(uvicorn.Server):
    """uvicorn, whose second Ctrl-C breaks off the answers and still ends the application; a third kills the process."""

    def handle_exit(self, sig: int, frame) -> None:
        if self.force_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets=None) -> None:
        ending = asyncio.ensure_future(super().shutdown(sockets))
        while not ending.done():
            if self.force_exit:
                for connection in list(self.server_state.connections):
                    connection.transport.abort()
            await asyncio.wait([ending], timeout=0.1)
        if self.force_exit:
            await self.lifespan.shutdown()


def http_config(app: FastAPI, arguments: argparse.Namespace) -> uvicorn.Config:
    """An HTTP server that is the same whatever else is installed: uvicorn's own choice goes by what it finds."""
    return uvicorn.Config(
        app,
        host=arguments.host,
        port=arguments.port,
        loop="asyncio",
        http="h11",
        ws="none",
        server_header=False,
        timeout_keep_alive=arguments.keep_alive,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Serves a ChatGLM model over HTTP.")
    add_arguments(parser)
    add_address_arguments(parser)
    arguments = parser.parse_args()
    # uvicorn raises the signal again once it has finished everything: here, that is the end it should have.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = settings_of(arguments)
    try:
        scheduler = load(settings)
    except (OSError, ValueError) as error:
        print(f"api_server.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    with contextlib.suppress(KeyboardInterrupt):
        HttpServer(http_config(create_app(settings, scheduler), arguments)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
