"""The server as an ASGI application."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import prometheus_client as prometheus
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from .. import loading
from ..trusted_hosts import TrustedHosts
from .answer_text import AnswerText
from .answers import Busy, Failed, Sampling, TimeLimit
from .errors import ApiError, ErrorReply, as_api_error, json_response
from .forms import ChatForm, CompletionForm, DetokenizeForm, PublicForm, TokenizeForm
from .gate import Gate
from .metrics import Metrics
from .pieces import pieces, unless_gone
from .scheduler import Scheduler
from .service import Service
from .settings import Settings


def load(settings: Settings) -> Scheduler:
    """The model at work. Raises OSError or ValueError with what is wrong."""
    model, tokenizer = loading.load(settings.model, settings.device, settings.dtype)
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
        scheduler.on_step = metrics.step
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
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    app.add_middleware(
        TrustedHosts,
        host=settings.host,
        allowed=settings.allowed_host,
        origins=settings.cors_origin,
        refused=lambda cause: metrics.refusals.labels(f"untrusted_{cause}").inc(),
    )
    if settings.cors_origin:  # outside of the gate: a preflight has no key
        everything: dict[str, list[str]] = {"allow_methods": ["*"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.cors_origin), **everything)

    async def on_error(request: Request, error: Exception) -> Response:
        told = as_api_error(error, request)
        metrics.refuse(told)
        return told.response()

    for kind in (ApiError, HTTPException, RequestValidationError, Busy, TimeLimit, Failed):
        app.add_exception_handler(kind, on_error)

    add_openai_routes(app, settings)
    add_public_route(app)
    add_monitoring_routes(app, metrics)
    return app


def add_openai_routes(app: FastAPI, settings: Settings) -> None:
    """Chat and text completions, and the one model."""

    @app.post("/v1/chat/completions")
    async def chat_completions(form: ChatForm, request: Request):
        service: Service = app.state.service
        prompt = await service.encode(request, "messages", lambda: service.prompts.of_chat(form))
        return await service.complete(request, form, [prompt])

    @app.post("/v1/completions")
    async def completions(form: CompletionForm, request: Request):
        service: Service = app.state.service
        alone = isinstance(form.prompt, str) or (form.prompt and isinstance(form.prompt[0], int))
        given = [form.prompt] if alone else form.prompt
        if not all(given) or not given:
            raise ApiError(400, "There is no prompt, or an empty one.", "prompt")
        prompts = await service.encode(
            request, "prompt", lambda: [service.prompts.of_completion(form, one) for one in given]
        )
        return await service.complete(request, form, prompts)

    @app.post("/tokenize")
    async def tokenize(form: TokenizeForm, request: Request):
        """The ids of a text, or of the prompt that a conversation makes."""
        service: Service = app.state.service
        ids = await service.encode(request, "prompt", lambda: service.prompts.ids_of(form))
        return {"tokens": ids, "count": len(ids), "max_model_len": service.scheduler.max_length}

    @app.post("/detokenize")
    async def detokenize(form: DetokenizeForm, request: Request):
        """The text of ids, without the names of control tokens."""
        service: Service = app.state.service
        return {"prompt": await service.encode(request, "tokens", lambda: service.prompts.text_of(form.tokens))}

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


def add_public_route(app: FastAPI) -> None:
    """The form of ChatGLM-6B's public api.py."""

    @app.post("/")
    async def public(form: PublicForm, request: Request):
        """The form of ChatGLM-6B's public api.py. The oldest rounds of a long history are left out."""
        service: Service = app.state.service
        scheduler = service.scheduler
        limit = min(form.max_length, scheduler.max_length)
        history = [tuple(pair) for pair in form.history]
        model, tokenizer = scheduler.model, scheduler.tokenizer
        inputs = await service.encode(
            request, "prompt", lambda: model.build_inputs(tokenizer, form.prompt, history, limit)
        )
        prompt = inputs["input_ids"][0].tolist()
        sampling = Sampling(limit - len(prompt), temperature=form.temperature, top_p=form.top_p)
        answers = scheduler.submit(prompt, [sampling], request.state.arrived)
        texts = [AnswerText(tokenizer, model.process_response)]
        watched = service.metrics.watch(pieces(answers, texts), answers, len(prompt))

        async def collect() -> str:
            async with contextlib.aclosing(watched):
                return "".join([piece.text async for piece in watched])

        response = await unless_gone(request, collect(), answers)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        history = [*form.history, [form.prompt, response]]
        return json_response({"response": response, "history": history, "status": 200, "time": now})


def add_monitoring_routes(app: FastAPI, metrics: Metrics) -> None:
    """Whether the model computes, and numbers for Prometheus."""

    @app.get("/health")
    @app.get("/health/live")
    async def health():
        """503 once the model does not compute any more, and only a restart helps."""
        if not app.state.service.scheduler.healthy:
            raise ApiError(503, "The model does not compute any more: restart the server.")
        return {"status": "ok"}

    @app.get("/health/ready")
    async def ready():
        """503 while another request would be refused: the queue is full, or the server is ending."""
        scheduler = app.state.service.scheduler
        if not scheduler.healthy or scheduler.closing or scheduler.places < 1:
            raise ApiError(503, "No request is taken now.", code="not_ready", headers={"Retry-After": "1"})
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics():
        return PlainTextResponse(
            prometheus.generate_latest(metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST
        )
