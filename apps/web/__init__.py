"""Chat with a model in the browser.

Each tab has its own conversation, answers are decoded together, and the interface is Chinese or English as the browser
is. The page uses the API of `chatglm serve`, which is at the same address. Nothing comes from the internet.
"""

import argparse
import contextlib
import signal
import sys

from ..arguments import add_model_arguments
from ..imports import imports
from ..server import Settings, add_address_arguments, add_memory_arguments
from ..trusted_hosts import add_allowed_host_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_address_arguments(parser)
    parser.set_defaults(port=7860)
    parser.add_argument("--title", help="of the page (default: the name of the model's folder)")
    parser.add_argument(
        "--root-path", default="", metavar="PATH", help="path of the page behind a proxy, such as /chat"
    )
    add_allowed_host_argument(parser)
    add_memory_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    with imports("demo"):
        from ..server.app import create_app, load
        from ..server.http_server import HttpServer, http_config
        from .page import add_page, detail_of, title_of
    # uvicorn raises the signal again once it has finished everything: here, that is the end it should have.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    names = ("model", "device", "dtype", "max_batch", "max_length", "host", "allowed_host")
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    scheduler = load(settings)
    app = create_app(settings, scheduler)
    title = arguments.title or title_of(arguments.model)
    add_page(app, scheduler, title, detail_of(scheduler.model), arguments.root_path)
    with contextlib.suppress(KeyboardInterrupt):
        HttpServer(http_config(app, arguments)).run()
