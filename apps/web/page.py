"""The page and its parts, beside the API that they use."""

import html
import posixpath
import string
import urllib.parse
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

from ..arguments import EMBEDDED
from ..server.scheduler import Scheduler

FOLDER = Path(__file__).parent
PARTS = {"page.css": "text/css", "page.js": "text/javascript", "markdown.js": "text/javascript"}
# Nothing but the page's own parts is loaded or run, whatever an answer holds, and no other page may frame this one.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, scheduler: Scheduler, title: str, detail: str, root_path: str = "") -> None:
    """Add the page, GET /, and its parts to the server's application.

    Args:
        title, detail: texts of the page's head.
        root_path: path or URL of the page behind a proxy, which drops it.
    """
    values = {
        "base": posixpath.join(urllib.parse.urlsplit(root_path).path or "/", ""),
        "title": title,
        "detail": detail,
        "max_length": str(scheduler.max_length),
    }
    template = string.Template((FOLDER / "page.html").read_text(encoding="utf-8"))
    add_part(app, "/", template.substitute({name: html.escape(value) for name, value in values.items()}), "text/html")
    for name, media_type in PARTS.items():
        add_part(app, f"/{name}", (FOLDER / name).read_text(encoding="utf-8"), media_type)


def add_part(app: FastAPI, path: str, text: str, media_type: str) -> None:
    async def part() -> Response:
        return Response(text, headers=HEADERS, media_type=media_type)

    app.add_api_route(path, part, include_in_schema=False)


def title_of(folder: str) -> str:
    """What the page calls a model: its folder's name."""
    path = Path(folder).resolve()
    return "ChatGLM" if path == EMBEDDED else path.name


def detail_of(model) -> str:
    """A model's parameters, the type of its weights, and the device, in a line."""
    bits = model.config.quantization_bit
    kind = f"INT{bits}" if bits else str(model.dtype).removeprefix("torch.")
    count = sum(parameter.numel() for parameter in model.parameters()) * (2 if bits == 4 else 1)
    size = f"{count / 1e9:.1f}B" if count >= 1e8 else f"{count / 1e6:.1f}M"
    return f"{size} · {kind} · {model.device.type}"
