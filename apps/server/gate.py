"""What each request passes first: the key, the size of its body, a name for it, a counter and a line of the log."""

import asyncio
import hmac
import logging
import re
import time
import uuid

from .errors import ApiError, as_api_error
from .metrics import Metrics
from .pieces import SEND
from .settings import Settings

logger = logging.getLogger("chatglm")
access = logging.getLogger("chatglm.access")

BODY_SECONDS = 30  # for a client to send its body
HEALTH = ("/health", "/health/live", "/health/ready")
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")  # what a client may call its request


class Gate:
    """ASGI middleware around everything: the key, the size of bodies, the count of requests, and `X-Request-Id`.

    A request keeps the id that it comes with, or gets one; it is in the reply and in the log.
    HEAD is answered as GET; the HTTP server leaves out the body. A slash at the end of a path is dropped.
    """

    def __init__(self, app, settings: Settings, metrics: Metrics):
        self.app = app
        self.metrics = metrics
        self.open_paths = (*HEALTH, "/metrics") if settings.open_metrics else HEALTH
        self.limit = settings.max_body
        self.key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        scope = {**scope, "method": method, "path": scope["path"].rstrip("/") or "/", SEND: send}
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        start, status = time.monotonic(), 499  # hung up

        async def counting(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
            await send(message)

        try:
            await self._pass(scope, receive, counting)
        except Exception as error:  # past here, the connection would be closed too
            logger.exception("A request failed")
            if status != 499:
                raise
            await self._refuse(as_api_error(error), scope, receive, counting)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            fields = {
                "request_id": request_id.decode(),
                "method": method,
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(time.monotonic() - start, 4),
            }
            access.info("%(method)s %(path)r %(status)d in %(seconds)s s, %(request_id)s", fields)

    async def _refuse(self, error: ApiError, scope, receive, send) -> None:
        self.metrics.refuse(error)
        await error.response()(scope, receive, send)

    async def _pass(self, scope, receive, send) -> None:
        headers = dict(scope["headers"])
        if self.key is not None and scope["path"] not in self.open_paths:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(given, self.key) or scheme.lower() != b"bearer":
                error = ApiError(
                    401,
                    "Incorrect API key: send it as Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await self._refuse(error, scope, receive, send)
                return
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except ApiError as error:
            await self._refuse(error, scope, receive, send)
            return
        except asyncio.TimeoutError:
            error = ApiError(408, f"The body did not arrive within {BODY_SECONDS} seconds.")
            await self._refuse(error, scope, receive, send)
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
