"""ASGI middleware against pages of other sites: the names and the pages that a server on this machine answers.

A browser reaches 127.0.0.1 for any page. DNS rebinding gives such a page a name of its own that leads here, so `Host`
is checked; a page may also send requests across origins whose replies it can't read, so `Origin` is checked.
"""

import argparse
import ipaddress
import json
import urllib.parse
from collections.abc import Callable, Sequence

LOCAL = ("localhost", "127.0.0.1", "::1")


def add_allowed_host_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allowed-host",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names that requests may ask for in Host and Origin, such as chat.example.org, or *; those of this "
        "machine always may (default: any, but on 127.0.0.1 and ::1 those of this machine alone)",
    )


def is_loopback(host: str) -> bool:
    """Whether a server bound to `host` is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def name_of(netloc: str) -> str:
    """The name in `name:port`, in lower case; "" if there is none."""
    try:
        return (urllib.parse.urlsplit(f"//{netloc}").hostname or "").rstrip(".")
    except ValueError:
        return ""


class TrustedHosts:
    """Answers 403 where `Host` or `Origin` is not among those trusted.

    `Host` is checked if the server is bound to a loopback address or `allowed` names hosts. Then `Origin`, where there
    is one, has to be the page's own (equal to `Host`), of an allowed name, or one of `origins`.

    Args:
        app: the ASGI application inside.
        host: the address that the server is bound to.
        allowed: more names that `Host` may have, without ports; "*" for any.
        origins: pages of other origins that may send requests (CORS), or "*".
        refused: called with "host" or "origin" for each refusal.
    """

    def __init__(
        self,
        app,
        host: str,
        allowed: Sequence[str] = (),
        origins: Sequence[str] = (),
        refused: Callable[[str], None] = lambda cause: None,
    ):
        self.app = app
        self.checks = "*" not in allowed and (bool(allowed) or is_loopback(host))
        self.allowed = frozenset(name_of(name) or name.lower() for name in allowed)
        self.names = self.allowed | {*LOCAL, name_of(host) or host.strip("[]").lower()}
        self.origins = frozenset(origins)
        self.refused = refused

    async def __call__(self, scope, receive, send) -> None:
        if self.checks and scope["type"] in ("http", "websocket") and (told := self._mistake(scope)):
            await _refuse(scope["type"], told, send)
            return
        await self.app(scope, receive, send)

    def _mistake(self, scope) -> str:
        hosts = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
        origins = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"origin"]
        if not all(name_of(host) in self.names for host in hosts):
            self.refused("host")
            return f"This server does not answer for the host {hosts[0][:200]!r}: start it with --allowed-host."
        if scope.get("method") == "OPTIONS" or "*" in self.origins:  # a preflight does nothing
            return ""
        for origin in origins:
            netloc = origin.partition("://")[2]
            if netloc not in hosts and name_of(netloc) not in self.allowed and origin not in self.origins:
                self.refused("origin")
                return f"Pages of {origin[:200]!r} may not use this server."
        return ""


async def _refuse(kind: str, message: str, send) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    error = {"message": message, "type": "permission_error", "param": None, "code": "untrusted_page"}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
