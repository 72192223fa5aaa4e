"""Serve a model over HTTP, in the form of OpenAI's API.

POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /health, GET /metrics (Prometheus), and POST / in
the form of ChatGLM-6B's public api.py: `{"prompt", "history", "max_length", "top_p", "temperature"}`. Requests are
decoded together. SIGTERM or Ctrl-C lets running answers finish; a second Ctrl-C breaks them off.

Arguments that a request leaves out are those of `model.chat`: temperature 0.95, top_p 0.7, top_k 50. What asks for
something that the model can't do (tools, images, response formats) is refused by name; what asks for nothing is taken.
"""

import argparse
import contextlib
import signal
import sys

from ..imports import imports
from .settings import (
    Settings,
    add_address_arguments,
    add_memory_arguments,
    add_settings_arguments,
    settings_of,
)

__all__ = ["Settings", "add_address_arguments", "add_memory_arguments", "add_settings_arguments", "settings_of"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings_arguments(parser)
    add_address_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    with imports("serve"):
        from .app import create_app, load
        from .http_server import HttpServer, http_config
    # uvicorn raises the signal again once it has finished everything: here, that is the end it should have.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = settings_of(arguments)
    app = create_app(settings, load(settings))
    with contextlib.suppress(KeyboardInterrupt):
        HttpServer(http_config(app, arguments)).run()
