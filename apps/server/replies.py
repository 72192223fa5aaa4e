"""Answers in the form of OpenAI's replies and events."""

import collections
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.responses import Response

from ...tokenization_chatglm import BYTES, WHITE_SPACE
from .answers import Answer, Token
from .errors import as_api_error, event, json_response, to_json
from .forms import ChatForm, SamplingForm, StreamOptions
from .pieces import Piece, unless_gone

logger = logging.getLogger("chatglm")

LOWEST = -9999.0  # log-probability: JSON has no infinity


class Reply:
    """The reply to one request, as a whole or as events.

    Args:
        tokenizer: for the names of tokens.
        form: what was asked.
        model: the name of the model in the API.
        read: tokens of all prompts.
        parts: pieces of all answers, as they come.
    """

    def __init__(self, tokenizer, form: SamplingForm, model: str, read: int, parts: AsyncIterator[Piece]):
        self._tokenizer = tokenizer
        self._form = form
        self._is_chat = isinstance(form, ChatForm)
        self._read = read
        self._parts = parts
        kind = "text_completion"
        if self._is_chat:
            kind = "chat.completion.chunk" if form.stream else "chat.completion"
        name = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._frame = {"id": name, "object": kind, "created": int(time.time()), "model": model}

    async def whole(self, request: Request, answers: list[Answer]) -> Response:
        """The reply when all answers are ready; they are cancelled if the client hangs up."""
        whole = [Piece(index, "", []) for index in range(len(answers))]

        async def collect() -> None:
            async with contextlib.aclosing(self._parts):
                async for piece in self._parts:
                    whole[piece.index].text += piece.text
                    whole[piece.index].tokens += piece.tokens
                    whole[piece.index].finish_reason = piece.finish_reason
                    whole[piece.index].count += piece.count

        await unless_gone(request, collect(), answers)
        choices = []
        for piece in whole:
            message = {"role": "assistant", "content": piece.text}
            choices.append(self._choice(piece, {"message": message} if self._is_chat else {"text": piece.text}))
        count = sum(piece.count for piece in whole)
        return json_response({**self._frame, "choices": choices, "usage": self._usage(count)})

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream."""
        form, parts = self._form, self._parts
        options = form.stream_options or StreamOptions()
        counts = options.include_usage and options.continuous_usage_stats
        count = 0

        def part(piece: Piece, delta: dict | None = None) -> bytes:
            if delta is None:
                delta = {"content": piece.text} if piece.text else {}
            choice = self._choice(piece, {"delta": delta} if self._is_chat else {"text": piece.text})
            used = {"usage": self._usage(count) if counts else None} if options.include_usage else {}
            return event({**self._frame, **used, "choices": [choice]})

        # Most parts of a choice differ in their text only: NUL takes its place in a template.
        around: dict[int, tuple[bytes, bytes]] = {}
        lengths = collections.Counter()
        try:
            async with contextlib.aclosing(parts):
                for index in range(form.n if self._is_chat else 0):
                    yield part(Piece(index, "", []), {"role": "assistant", "content": ""})
                async for piece in parts:
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
            if options.include_usage:
                yield event({**self._frame, "choices": [], "usage": self._usage(count)})
            yield b"data: [DONE]\n\n"
        except Exception as error:
            told = as_api_error(error)
            if told.status == 500:
                logger.exception("A stream failed")
            yield event(told.body)

    def _usage(self, count: int) -> dict:
        return {"prompt_tokens": self._read, "completion_tokens": count, "total_tokens": self._read + count}

    def _choice(self, piece: Piece, content: dict) -> dict:
        logprobs = None
        if self._form.reported is not None and (piece.tokens or piece.finish_reason):
            if self._is_chat:
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
        """Log-probabilities of a context are null: its tokens see each other."""
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
