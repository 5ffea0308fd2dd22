"""uvicorn on the router's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from splitserve.cluster.errors import StartupError
from splitserve.router.http_protocol import bounded

GRACE_S = 1
UNREAD_S = 60.0  # a client that takes nothing for so long has its connection cut: a drain would wait for it


class HttpServer:
    """Serves `app` at `address`, host:port, to so many connections, over TLS where there is a `context` for it."""

    def __init__(self, app: ASGIApp, address: str, max_connections: int, context: ssl.SSLContext | None = None) -> None:
        config = uvicorn.Config(
            app,
            http=bounded(max_connections),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nobody asks for a client's address
            timeout_graceful_shutdown=GRACE_S,
            ssl_context_factory=None if context is None else lambda config, make: context,
        )
        self._server = _Server(config)
        self._address = address

    def start(self) -> None:
        """Listen. Raises StartupError when the address cannot be had."""
        listener = _listen(self._address)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))

    async def drain(self) -> None:
        """Refuse new requests, and return when the running ones have ended."""
        self._server.config.timeout_graceful_shutdown = None
        self._server.should_exit = True
        await self._serving

    async def stop(self) -> None:
        """Refuse new requests, give running ones GRACE_S seconds, then end them."""
        self._server.should_exit = True
        # uvicorn ends those that take longer by itself, and tells their clients; all but after a drain.
        await asyncio.wait([self._serving], timeout=2 * GRACE_S)
        self._server.force_exit = True
        await self._serving


class _Server(uvicorn.Server):
    """Leaves signals to the process that it is a part of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted connections have it, too.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(UNREAD_S * 1000))
            listener.bind(place)
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise StartupError(f"router.http: cannot listen on {address}: {error}") from error
    listener.setblocking(False)
    return listener
