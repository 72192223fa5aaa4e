"""Errors and replies as JSON, in OpenAI's form whatever happens."""

import json

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from .answers import Busy, Failed, TimeLimit

ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
NO_JSON = "The body is not JSON in UTF-8, or has numbers or nesting beyond reason."

PATHS = "/v1/chat/completions, /v1/completions, /v1/models, /tokenize, /detokenize, /health, /metrics, and POST /"


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorBody


class ApiError(Exception):
    """An answer that is an error. The message goes to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = headers
        kinds = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def to_json(body: dict | str) -> bytes:
    # A client can send half a surrogate pair as an escape; quoted in an error, it has no UTF-8.
    return ENCODER.encode(body).encode("utf-8", "replace")


def json_response(body: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(body), status, headers, media_type="application/json")


def event(body: dict) -> bytes:
    """One event of a stream."""
    return b"data: " + to_json(body) + b"\n\n"


def as_api_error(error: Exception, request: Request | None = None) -> ApiError:
    """What a client is told about any exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        # Of what may be a text or a list, both are reported: the deeper mistake is that of the form that was meant.
        mistake = max(error.errors(), key=lambda mistake: len(mistake["loc"]))
        kind, names = mistake["type"], [str(part) for part in mistake["loc"][1:]]  # the first is "body" or "path"
        if kind == "string_type" and names[-1:] == ["str"]:
            names.pop()
        param = ".".join(name for name in names if not name.startswith("list["))[:200] or None
        if kind == "extra_forbidden":
            told = f"{param} is no argument of this server, or asks for what this model can't do: leave it out."
            return ApiError(400, told, param, "unknown_parameter")
        if kind == "json_invalid":
            return ApiError(400, NO_JSON)
        if kind == "model_attributes_type":
            how = "" if param else ", sent with Content-Type: application/json"
            return ApiError(400, f"{param or 'The body'} has to be a JSON object{how}.", param)
        return ApiError(400, f"{param or 'The body'}: {mistake['msg'].removeprefix('Value error, ')}.", param)
    if isinstance(error, Busy):
        return ApiError(
            429,
            "The server is busy: its queue is full. Try again in a moment.",
            code="busy",
            headers={"Retry-After": "1"},
        )
    if isinstance(error, TimeLimit):
        return ApiError(408, str(error), code="time_limit", headers={"x-should-retry": "false"})
    if isinstance(error, Failed):
        return ApiError(503, str(error))
    if isinstance(error, HTTPException):
        if error.status_code in (404, 405) and request is not None:
            where = f"{request.method} {request.url.path[:200]}"
            what = "There is no such path" if error.status_code == 404 else "The method does not fit the path"
            there = "" if error.status_code == 405 else f" There is {PATHS}."
            return ApiError(error.status_code, f"{what}: {where}.{there}", headers=error.headers)
        return ApiError(error.status_code, NO_JSON if error.status_code == 400 else str(error.detail))
    return ApiError(500, "The server failed to answer this request.")
