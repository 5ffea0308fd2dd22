"""uvicorn's HTTP connection, bounded in what it takes from a client before anybody knows who that is.

connected --> head --> body --> whole      the time and the bytes of head and body are bounded, and so is the number of
    ^                            |         connections; what goes beyond gets one answer, and the connection is closed
    +------ the next request ----+
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from splitserve.router.http_body import MAX_BODY_BYTES, READ_S
from splitserve.router.http_errors import refusal
from splitserve.router.openai_responses import to_json

MAX_HEADERS = 100
MAX_HEAD_BYTES = 32 * 1024
HEAD_S = 10.0
# A body that is too large or too late is told by whoever reads it. This is for those who go on sending all the same.
MAX_MESSAGE_BYTES = 2 * MAX_BODY_BYTES
BODY_S = READ_S + 5.0


class _Refused(Exception):
    """Ends the parser's work from within its callbacks."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection of at most `max_connections`."""

    max_connections = 0  # set by `bounded`

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any], **more: Any) -> None:
        super().__init__(config, server_state, app_state, **more)
        self._taken = 0
        self._most: int | None = None  # bytes of what is being taken; None between requests
        self._refusal = (400, "this is no HTTP request")
        self._timer: asyncio.TimerHandle | None = None
        self._closes = False  # once this request is over

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > self.max_connections:
            self._refuse(503, f"{self.max_connections} connections are open, the most of this router")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self._refuse(*self._refusal)
        if self._most is None and self.cycle.response_complete:
            self._await_head()  # empty lines between requests have undone uvicorn's own timer
        if self._most is not None and not self.transport.is_closing():
            self._taken += len(data)
            if self._taken > self._most:
                self._refuse(*_too_much(self._most))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._most != MAX_HEAD_BYTES:
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) == MAX_HEADERS:
            self._refusal = _too_much(MAX_HEAD_BYTES)
            raise _Refused
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refusal = _too_much(MAX_HEAD_BYTES)
            raise _Refused
        if self._is_offer():
            return
        self._expect(MAX_MESSAGE_BYTES, BODY_S)
        super().on_headers_complete()
        # An answer that comes before all of the body must not close the connection: bytes that nobody reads reset it,
        # and the answer is lost.
        self._closes = not self.cycle.keep_alive
        self.cycle.keep_alive = True

    def on_message_complete(self) -> None:
        if self._is_offer():
            return
        self._most = None
        self._end_timer()
        super().on_message_complete()
        if self._closes:
            self.cycle.keep_alive = False
            if self.cycle.response_complete:
                self.transport.close()

    def _feed(self, data: bytes) -> None:
        """Parse `data`, a head that offers another protocol without the offer: the parser leaves out such bodies."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if not self._is_offer():  # but CONNECT: nothing that follows is for us
                    return
                start = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
                fields = (b"%b: %b" % field for field in self.headers if field[0] != b"upgrade")
                data = b"\r\n".join([start, *fields, b"", data[upgrade.args[0] :]])
                self.parser = httptools.HttpRequestParser(self)  # after `connection: close` the old one ignores all
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def _is_offer(self) -> bool:
        return self.parser.should_upgrade() and any(name == b"upgrade" for name, _ in self.headers)

    def _await_head(self) -> None:
        self._expect(MAX_HEAD_BYTES, HEAD_S)

    def _expect(self, most: int, seconds: float) -> None:
        self._end_timer()
        self._taken, self._most = 0, most
        self._timer = self.loop.call_later(
            seconds, self._refuse, 408, f"the request was not whole within {seconds:g} s"
        )

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _refuse(self, status: int, message: str) -> None:
        body = to_json(refusal(status, message))
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        if self.cycle is None or self.cycle.response_complete:  # else another answer is on its way already
            self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self._end_timer()
        self.transport.close()


def bounded(max_connections: int) -> type[BoundedProtocol]:
    """The protocol for a server of at most so many connections."""
    return type("Bounded", (BoundedProtocol,), {"max_connections": max_connections})


def _too_much(most: int) -> tuple[int, str]:
    if most == MAX_HEAD_BYTES:
        return 431, f"a head has at most {MAX_HEADERS} headers and {MAX_HEAD_BYTES} bytes"
    return 413, f"a request has at most {MAX_BODY_BYTES} bytes"
