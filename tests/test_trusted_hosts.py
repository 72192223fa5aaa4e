"""Names and pages that a server on this machine answers."""

import asyncio
import json

import pytest

from chatglm_int8.apps.trusted_hosts import TrustedHosts, is_loopback


def status_of(headers: dict[str, str], method: str = "POST", kind: str = "http", **options) -> int:
    """The status of one request; 200 if it reached the application."""
    sent = []

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message) -> None:
        sent.append(message)

    given = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": kind, "method": method, "headers": given}
    asyncio.run(TrustedHosts(app, **{"host": "127.0.0.1", **options})(scope, None, send))
    if sent[0]["type"] == "websocket.close":
        return 403
    if sent[0]["status"] != 200:
        assert set(json.loads(sent[1]["body"])["error"]) == {"message", "type", "param", "code"}
    return sent[0]["status"]


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost", "LocalHost:1", "localhost.:8000", "[::1]:8000", "[::1]"]
)
def test_names_of_this_machine(host):
    assert status_of({"Host": host}) == status_of({"Host": host, "Origin": f"http://{host}"}) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example:8000", "localhost@evil.example", "[::1", "", "0.0.0.0:8000", "\xe9"],
)
def test_rebinding(host):
    assert status_of({"Host": host}) == status_of({"Host": host}, kind="websocket") == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:3000", "https://localhost.evil.example"]
)
def test_pages_of_other_origins(origin):
    headers = {"Host": "localhost:8000", "Origin": origin}
    assert status_of(headers) == 403
    assert status_of(headers, "OPTIONS") == 200  # the preflight is CORS's
    assert status_of(headers, origins=[origin]) == status_of(headers, origins=["*"]) == 200


def test_allowed_names():
    page = {"Host": "chat.example.org", "Origin": "https://chat.example.org"}
    assert status_of(page) == 403
    assert status_of(page, allowed=["Chat.Example.org"]) == 200
    assert status_of(page, host="0.0.0.0") == status_of(page, allowed=["*"]) == 200
    assert status_of(page, host="0.0.0.0", allowed=["other.example.org"]) == 403
    # A proxy that asks for the address behind it.
    assert status_of({**page, "Host": "127.0.0.1:8000"}, allowed=["chat.example.org"]) == 200
    assert status_of({}) == 200  # HTTP/1.0: no browser


def test_refusals_are_counted():
    causes = []
    status_of({"Host": "evil.example"}, refused=causes.append)
    status_of({"Host": "localhost", "Origin": "null"}, refused=causes.append)
    assert causes == ["host", "origin"]


def test_loopback_addresses():
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.1.2", "example.org"]))
