"""The status page at `/`, and the JSON that it shows: one static file, which may load nothing from anywhere else."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from importlib.resources import files
from typing import Any

from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from splitserve.router.http_errors import json_response
from splitserve.router.v1 import splitserve_pb2 as pb

PAGE = files("splitserve.router").joinpath("status_page.html").read_text()


def _hashes(tag: str) -> str:
    """What allows the page's own inline `tag`, and no other."""
    contents = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'" for content in contents)


HEADERS = {
    "content-security-policy": f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def routes(status: Callable[[], pb.StatusResponse]) -> list[Route]:
    """The page, and `/status.json` with what `status` says."""

    async def page(request: Request) -> Response:
        return Response(PAGE, headers=HEADERS, media_type="text/html")

    async def data(request: Request) -> Response:
        return json_response(plain(status()), headers={"cache-control": "no-store"})

    return [Route("/", page), Route("/status.json", data)]


def plain(message: Message) -> dict[str, Any]:
    """All fields of a message by name, set or not: numbers as numbers, enums as the ends of their names."""
    return {field.name: _plain(field, getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _plain(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return plain(value) if isinstance(value, Message) else [plain(one) for one in value]
    if field.enum_type is not None:
        return str(field.enum_type.values_by_number[value].name).rpartition("_")[2].lower()
    return value
