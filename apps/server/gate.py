"""What each request passes first: the key, the size of its body, and a counter."""

import asyncio
import hmac
import logging

import prometheus_client as prometheus

from .errors import ApiError, as_api_error
from .settings import Settings

logger = logging.getLogger("chatglm")

BODY_SECONDS = 30  # for a client to send its body


class Gate:
    """ASGI middleware around everything: the key, the size of bodies, and the count of requests.

    HEAD is answered as GET; the HTTP server leaves out the body. A slash at the end of a path is dropped.
    """

    def __init__(self, app, settings: Settings, requests: prometheus.Counter):
        self.app = app
        self.requests = requests
        self.limit = settings.max_body
        self.key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        scope = {**scope, "method": method, "path": scope["path"].rstrip("/") or "/"}
        status = 499  # hung up

        async def counting(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, counting)
        except Exception as error:  # past here, the connection would be closed too
            logger.exception("A request failed")
            if status != 499:
                raise
            await as_api_error(error).response()(scope, receive, counting)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.requests.labels(path, str(status)).inc()

    async def _pass(self, scope, receive, send) -> None:
        headers = dict(scope["headers"])
        if self.key is not None and scope["path"] != "/health":
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(given, self.key) or scheme.lower() != b"bearer":
                error = ApiError(
                    401,
                    "Incorrect API key: send it as Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        except asyncio.TimeoutError:
            error = ApiError(408, f"The body did not arrive within {BODY_SECONDS} seconds.")
            await error.response()(scope, receive, send)
            return
        if body is None:
            return
        first = {"type": "http.request", "body": body, "more_body": False}

        async def replay():
            nonlocal first
            message, first = first, None
            return message if message is not None else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive) -> bytes | None:
        """The whole body, None if the client hung up."""
        body, size, more = bytearray(), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            if size <= self.limit:
                body += message.get("body", b"")
            elif size > 16 * self.limit:
                break  # else the rest is read and dropped: a client that is still sending misses the reply
            more = message.get("more_body", False)
        if size > self.limit:
            raise ApiError(413, f"The body is larger than {self.limit} bytes.", code="body_too_large")
        return bytes(body)
