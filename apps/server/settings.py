"""What a server is started with, and the arguments of the command line for it."""

import argparse
import dataclasses
import os
import urllib.parse
from collections.abc import Sequence

from ..arguments import EMBEDDED, add_model_arguments, port, positive
from ..trusted_hosts import add_allowed_host_argument

MAX_BATCH = 16  # answers decoded together, by default
KEEP_ALIVE = 75  # seconds: longer than the 60 of proxies and the pauses of a person


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server is started with; the command line has the same names."""

    model: str = str(EMBEDDED)
    device: str | None = None
    dtype: str = "auto"
    name: str = "chatglm"
    api_key: str | None = None
    max_batch: int = MAX_BATCH
    max_queue: int = 64
    max_length: int | None = None
    max_body: int = 1 << 18
    time_limit: float = 300.0
    cors_origin: Sequence[str] = ()
    host: str = "127.0.0.1"
    allowed_host: Sequence[str] = ()
    open_metrics: bool = False


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `Settings`, but for `host`, which is among those of the address."""
    default = Settings()
    add_model_arguments(parser)
    parser.add_argument("--name", default=default.name, help="the model's name in the API")
    add_memory_arguments(parser)
    parser.add_argument("--max-queue", type=positive(int), default=default.max_queue, help="answers that may wait")
    parser.add_argument("--max-body", type=positive(int), default=default.max_body, help="bytes of a request")
    parser.add_argument("--time-limit", type=positive(float), default=default.time_limit, help="seconds of a request")
    parser.add_argument(
        "--api-key",
        type=key,
        default=os.environ.get("CHATGLM_API_KEY"),
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
    add_allowed_host_argument(parser)
    parser.add_argument("--open-metrics", action="store_true", help="GET /metrics needs no key")


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """What a `Scheduler` is given for the memory there is: --max-batch and --max-length."""
    parser.add_argument("--max-batch", type=positive(int), default=MAX_BATCH, help="answers decoded together")
    parser.add_argument("--max-length", type=positive(int), help="tokens of prompt and answer (default: the model's)")


def add_address_arguments(parser: argparse.ArgumentParser) -> None:
    """Where and how the API is reached: --host, --port and --keep-alive."""
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all networks")
    parser.add_argument("--port", type=port, default=8000, help="0 for any that is free")
    parser.add_argument(
        "--keep-alive",
        type=positive(int),
        default=KEEP_ALIVE,
        metavar="SECONDS",
        help="close connections that are idle for longer",
    )


def key(text: str) -> str:
    """A key, of an argument's text or the environment's."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the key is empty: give one, or leave out --api-key and CHATGLM_API_KEY")
    return text


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """What one server of our own has beside `add_address_arguments`: how it ends, and what it writes."""
    parser.add_argument(
        "--drain", type=positive(float), default=60.0, metavar="SECONDS", help="for running answers after SIGTERM"
    )
    parser.add_argument("--log-json", action="store_true", help="write the log as JSON, a line for each request too")


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
