"""Errors as OpenAI's clients know them: a status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import math

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from splitserve.cluster.errors import InvalidRequest, Overloaded, SplitserveError, Unauthenticated
from splitserve.router.openai_responses import Json, to_json

STATUSES = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNAVAILABLE": 503,
    "ABORTED": 503,
    "DEADLINE_EXCEEDED": 504,
}
NAMES = {
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    408: "REQUEST_TIMEOUT",
    413: "PAYLOAD_TOO_LARGE",
    431: "HEAD_TOO_LARGE",
    503: "UNAVAILABLE",
}


def error_object(error: SplitserveError) -> Json:
    """What is wrong, for a response's body or a stream's last event."""
    param = error.field if isinstance(error, InvalidRequest) else None
    return _object(status_of(error), str(error), param, error.code)


def status_of(error: SplitserveError) -> int:
    """The HTTP status that goes with `error`."""
    return STATUSES.get(error.code, 500)


def refusal(status: int, message: str) -> Json:
    """What is wrong with something that is no whole request."""
    return _object(status, message, None, NAMES.get(status, "INVALID_ARGUMENT"))


async def on_splitserve_error(request: Request, error: Exception) -> Response:
    """The response to an error raised on purpose, with what Overloaded and Unauthenticated say in headers."""
    assert isinstance(error, SplitserveError)
    headers = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after_s * 1000))
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return json_response(error_object(error), status_of(error), headers)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """The response to what is wrong before any body is read: path, method, size."""
    assert isinstance(error, HTTPException)
    return json_response(refusal(error.status_code, error.detail), error.status_code, dict(error.headers or {}))


async def on_fault(request: Request, error: Exception) -> Response:
    """The response to a fault of ours, which the server logs."""
    return json_response(_object(500, "internal error; the router's log tells more", None, "INTERNAL"), 500)


def json_response(content: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with a JSON body."""
    return Response(to_json(content), status, headers, media_type="application/json")


def _object(status: int, message: str, param: str | None, code: str) -> Json:
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code.lower()}}
