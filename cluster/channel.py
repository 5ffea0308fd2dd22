"""ZeroMQ channels between routers and workers: workers bind, routers connect, MessagePack travels.

Sockets are created here and nowhere else, so that limits and encryption (CURVE) hold for all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils import z85

from splitserve.cluster.codec import MAX_MESSAGE_BYTES, pack, unpack
from splitserve.cluster.errors import ProtocolError, StartupError

SEND_QUEUE = 100_000
LINGER_MS = 200
BURST = 64  # messages of one worker that a router takes before others get a turn
KV_IDLE_S = 60.0  # a way from one rank to another that carried no KV for so long is closed

Socket = zmq.Socket[Any]
Pollable = Socket | int  # or a file descriptor


@dataclass(frozen=True)
class CurveKeys:
    """The cluster's own CURVE key pair (Z85 text). Whoever holds it is a member; nobody else gets a byte through.

    Both halves are secrets: whoever knows the public one may connect.
    """

    public: str = field(repr=False)
    secret: str = field(repr=False)

    @classmethod
    def generate(cls) -> CurveKeys:
        return cls.of_secret(secrets.token_bytes(32))

    @classmethod
    def of_secret(cls, secret: bytes) -> CurveKeys:
        """The pair of 32 secret bytes."""
        encoded = z85.encode(secret)
        return cls(zmq.curve_public(encoded).decode(), encoded.decode())


def secure(socket: Socket, keys: CurveKeys | None, *, server: bool) -> None:
    """Set size limits on `socket` and, with `keys`, CURVE in both directions. Call before bind or connect."""
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.SNDHWM, SEND_QUEUE)
    socket.setsockopt(zmq.RCVHWM, SEND_QUEUE)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 3_000)
    if keys is None:
        return
    socket.curve_publickey = keys.public.encode()
    socket.curve_secretkey = keys.secret.encode()
    if server:
        # libzmq asks no authenticator (ZAP) here: a client must know the server's public key, which only members do.
        socket.curve_server = True
    else:
        socket.curve_serverkey = keys.public.encode()


def bind(socket: Socket, address: str, port: int = 0) -> str:
    """Bind to `address` (a host without port) and return the endpoint.

    Raises StartupError naming address and port, and closes the socket, when that fails.
    """
    is_ipv6 = ":" in address
    socket.setsockopt(zmq.IPV6, int(is_ipv6))
    host = f"[{address}]" if is_ipv6 else address
    try:
        socket.bind(f"tcp://{host}:{port or '*'}")
    except zmq.ZMQError as error:
        socket.close(linger=0)
        where = f"{address}:{port}" if port else address
        raise StartupError(f"cannot bind {where}: {error.strerror}; free it or name another address") from error
    endpoint: bytes = socket.getsockopt(zmq.LAST_ENDPOINT)  # type: ignore[assignment]
    return endpoint.decode().rstrip("\0")


def wait(sockets: Iterable[Pollable], timeout_ms: int) -> None:
    """Return when one of `sockets` has something to read, or after `timeout_ms`."""
    poller = zmq.Poller()
    for socket in sockets:
        poller.register(socket, zmq.POLLIN)
    poller.poll(timeout_ms)


class WorkerChannel:
    """A worker's side: one ROUTER socket for all routers. Polled from the worker's loop; not thread-safe."""

    def __init__(self, address: str, keys: CurveKeys | None = None) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        secure(self._socket, keys, server=True)
        # A router that leaves and comes back at once may be here before the end of its last connection is.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.address = bind(self._socket, address)
        self.malformed = 0

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For `wait`."""
        return self._socket

    def receive(self) -> Iterator[tuple[bytes, Any]]:
        """All waiting messages as (router identity, message). Malformed ones are counted and dropped."""
        while True:
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if len(frames) != 1:
                    raise ProtocolError(f"{len(frames)} frames, expected 1")
                item = unpack(frames[0])
            except ProtocolError:
                self.malformed += 1
                continue
            yield identity, item

    def send(self, identity: bytes, item: object) -> None:
        """Send without waiting. A router that is gone or never reads loses its messages: its leases end anyway."""
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart([identity, pack(item)], zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.close(linger=0)


class RouterChannel:
    """A router's side of one worker: a DEALER socket that its event loop watches. `identity` is unique among routers.

    `on_message` gets each well-formed message. Nothing waits and no task is made: pyzmq's own sockets for asyncio take
    several times as long.
    """

    def __init__(
        self, address: str, identity: bytes, on_message: Callable[[Any], None], keys: CurveKeys | None = None
    ) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        secure(self._socket, keys, server=False)
        self._socket.setsockopt(zmq.IDENTITY, identity)
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._read)
        self._socket.connect(address)
        self.malformed = 0

    def send(self, item: object) -> None:
        """Send without waiting. A worker that never reads loses its messages; once the channel is closed, all do."""
        if self._socket.closed:
            return
        with contextlib.suppress(zmq.Again):
            self._socket.send(pack(item), zmq.NOBLOCK)
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:  # a send takes the news of what has come with it
            self._loop.call_soon(self._read)

    def close(self) -> None:
        """What was sent just now still goes out."""
        if not self._socket.closed:
            self._loop.remove_reader(self._socket.FD)
            self._socket.close(linger=LINGER_MS)

    def _read(self) -> None:
        """Take what has come. The loop is told of it but once, so that it is to look again unless nothing is left."""
        again = self._loop.call_soon(self._read)
        for _ in range(BURST):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:  # nothing is left, or the last message had the channel closed
                again.cancel()
                return
            try:
                if len(frames) != 1:
                    raise ProtocolError(f"{len(frames)} frames, expected 1")
                item = unpack(frames[0])
            except ProtocolError:
                self.malformed += 1
                continue
            self._on_message(item)
