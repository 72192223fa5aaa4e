"""Serve a model over HTTP, in the form of OpenAI's API.

POST /v1/chat/completions, POST /v1/completions, GET /v1/models, POST /tokenize and /detokenize, GET /health/live and
/health/ready, GET /metrics (Prometheus), and POST / in the form of ChatGLM-6B's public api.py: `{"prompt", "history",
"max_length", "top_p", "temperature"}`. Requests are decoded together. SIGTERM or Ctrl-C lets running answers finish for
--drain seconds; a second Ctrl-C breaks them off.

Arguments that a request leaves out are those of `model.chat`: temperature 0.95, top_p 0.7, top_k 50. What asks for
something that the model can't do (tools, images, response formats) is refused by name; what asks for nothing is taken.
"""

import argparse
import contextlib
import logging
import signal
import sys

from ..imports import imports
from ..trusted_hosts import is_loopback
from .settings import (
    Settings,
    add_address_arguments,
    add_memory_arguments,
    add_serve_arguments,
    add_settings_arguments,
    settings_of,
)

__all__ = ["Settings", "add_address_arguments", "add_memory_arguments", "add_settings_arguments", "settings_of"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings_arguments(parser)
    add_address_arguments(parser)
    add_serve_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    with imports("serve"):
        from .app import create_app, load
        from .http_server import HttpServer, http_config
    # uvicorn raises the signal again once it has finished everything: here, that is the end it should have.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = settings_of(arguments)
    if settings.api_key is None and not is_loopback(settings.host):
        warning = "Anyone who reaches %s can use this server: there is no --api-key."
        logging.getLogger("chatglm").warning(warning, settings.host)
    scheduler = load(settings)
    config = http_config(create_app(settings, scheduler), arguments)
    with contextlib.suppress(KeyboardInterrupt):
        HttpServer(config, arguments.drain, scheduler.close).run()
