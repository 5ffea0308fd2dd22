"""Reading a request's JSON: bounded in size and time before anything is parsed."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from splitserve.cluster.errors import InvalidRequest, RequestCancelled

MAX_BODY_BYTES = 16 * 1024 * 1024
READ_S = 30.0


async def read_json(request: Request) -> dict[str, Any]:
    """The object in a request's body. Raises InvalidRequest, or HTTPException with 413 or 408."""
    try:
        async with asyncio.timeout(READ_S):
            body = await _read(request)
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {READ_S:g} s") from None
    except ClientDisconnect:
        raise RequestCancelled("the client left before its request was whole") from None
    return parse_object(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises InvalidRequest for anything else, and for keys that stand there twice."""
    try:
        content = json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "values are nested too deep" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest("body", body[:40], f"give one JSON object in UTF-8: {reason}") from None
    if not isinstance(content, dict):
        raise InvalidRequest("body", content, "give a JSON object")
    return content


async def _read(request: Request) -> bytes:
    if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise _too_large()
    return bytes(body)


def _too_large() -> HTTPException:
    return HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{name[:80]!r} stands there twice")
        content[name] = value
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
