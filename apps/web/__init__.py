"""Chat with a model in the browser.

Each tab has its own conversation, answers are decoded together, and the interface is Chinese or English as the browser
is. Nothing comes from the internet.
"""

import argparse
import os

from ..arguments import add_model_arguments, port
from ..imports import imports
from ..server import add_memory_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all networks")
    parser.add_argument("--port", type=port, default=7860, help="0 for any that is free")
    parser.add_argument("--root-path", metavar="PATH", help="path or URL of the page behind a proxy, such as /chat")
    add_memory_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
    with imports("demo"):
        from ..loading import load
        from ..server.scheduler import Scheduler
        from .page import Chat, launch
    model, tokenizer = load(arguments.model, arguments.device, arguments.dtype)
    scheduler = Scheduler(model, tokenizer, arguments.max_batch, max_length=arguments.max_length)
    address = {"server_name": arguments.host, "server_port": arguments.port, "root_path": arguments.root_path}
    launch(Chat(scheduler), **address)
    scheduler.close()
