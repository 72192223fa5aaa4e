"""A model behind the API: from forms to replies."""

import time
from collections.abc import Callable
from typing import Any

import anyio
from fastapi import Request
from fastapi.responses import Response

from .answer_text import AnswerText
from .answers import Answer, Busy, Sampling, TimeLimit, cancel
from .errors import ApiError
from .forms import ChatForm, SamplingForm
from .metrics import Metrics
from .pieces import EventStream, pieces
from .prompts import Prompt, Prompts
from .replies import Reply
from .scheduler import Scheduler
from .settings import Settings


class Service:
    """Encodes what comes in, has it answered and puts answers into the form of the API."""

    def __init__(self, settings: Settings, scheduler: Scheduler, metrics: Metrics):
        self.settings = settings
        self.scheduler = scheduler
        self.metrics = metrics
        self.prompts = Prompts(scheduler.tokenizer, scheduler.max_length)
        self._one_encoder = anyio.CapacityLimiter(1)

    async def encode(self, request: Request, param: str, make: Callable[[], Any]) -> Any:
        """Runs an encoding of `param`, which may be long, beside the event loop; its ValueErrors are the client's.

        The queue for it is as long as that for answers, the time limit of the request counts from here, and a client
        that has hung up is not waited for.
        """
        request.state.arrived = time.monotonic()
        if self._one_encoder.statistics().tasks_waiting >= self.settings.max_batch + self.settings.max_queue:
            raise Busy
        async with self._one_encoder:
            if time.monotonic() - request.state.arrived > self.scheduler.time_limit:
                raise TimeLimit(f"The request waited for more than {self.scheduler.time_limit:g} seconds.")
            if await request.is_disconnected():
                raise ApiError(499, "The client hung up.")
            try:
                return await anyio.to_thread.run_sync(make)
            except ValueError as error:
                raise ApiError(400, str(error), param) from None

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
        answers: list[Answer] = []
        places = self.scheduler.max_batch + self.scheduler.max_queue
        if len(prompts) * form.n > places:
            raise ApiError(400, f"{len(prompts)} prompts with n = {form.n} are more than {places} answers.", "prompt")
        wanted = [(prompt.ids, self.samplings(form, prompt.ids)) for prompt in prompts]
        try:
            for ids, samplings in wanted:
                answers += self.scheduler.submit(ids, samplings, request.state.arrived)
        except Exception:
            cancel(answers)
            raise
        is_chat, tokenizer = isinstance(form, ChatForm), self.scheduler.tokenizer
        process = self.scheduler.model.process_response if is_chat else None
        of_answers = [prompt for prompt in prompts for _ in range(form.n)]
        texts = [AnswerText(tokenizer, process, form.stop, prompt.begun) for prompt in of_answers]
        echoed = None if is_chat or not form.echo else [prompt.echoed for prompt in of_answers]
        read = sum(len(prompt.ids) for prompt in prompts)
        parts = self.metrics.watch(pieces(answers, texts, echoed, form.reported is not None), answers, read)
        reply = Reply(tokenizer, form, self.settings.name, read, parts)
        return EventStream(reply.events(), answers) if form.stream else await reply.whole(request, answers)
