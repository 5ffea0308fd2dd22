"""Messages between processes of one host, over Unix sockets: a tenth of the time that they take through ZeroMQ.

A receiver listens at an abstract address, which leaves no file behind, made of its segment's name. Both ends speak to
processes of their own user alone, as segments do.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import select
import socket
import struct

from splitserve.cluster.channel import Pollable
from splitserve.cluster.errors import StartupError
from splitserve.kv_transfer.protocol import MAX_HEADER_BYTES

BACKLOG = 128
_CREDENTIALS = struct.Struct("3i")  # process, user, group


class LocalPeers:
    """Connections to processes of this host, each with the name of its peer.

    A message comes whole, or not at all: where its queue is full, or the peer is gone. With `segment`, a name, others
    connect to this end; StartupError says that another process listens there.
    """

    def __init__(self, segment: str | None = None) -> None:
        self._news = select.epoll()
        self._connections: dict[bytes, socket.socket] = {}
        self._peers: dict[int, bytes] = {}  # by file descriptor
        self._callers = (b"caller %d" % count for count in itertools.count())
        self._listener = None if segment is None else self._listen(segment)

    @property
    def sockets(self) -> list[Pollable]:
        """What `receive` reads, for whoever waits for news."""
        return [self._news.fileno()]

    def __contains__(self, peer: bytes) -> bool:
        return peer in self._connections

    def connect(self, peer: bytes, segment: str) -> None:
        """Does nothing when nobody of this user listens for `segment` here: when that is in another container, say."""
        connection = _socket()
        try:
            connection.connect(_address(segment))
        except OSError:
            connection.close()
        else:
            self._add(peer, connection)

    def receive(self, limit: int) -> list[tuple[bytes, bytes]]:
        """Up to `limit` messages that have come, with their peers. Peers take turns; to come or go takes one, too."""
        found: list[tuple[bytes, bytes]] = []
        while limit > 0 and (ready := self._news.poll(0, limit)):
            limit -= len(ready)
            for number, _ in ready:
                if self._listener is not None and number == self._listener.fileno():
                    self._accept(self._listener)
                elif message := _receive(self._connections[peer := self._peers[number]]):
                    found.append((peer, message))
                else:
                    self.drop(peer)
        return found

    def send(self, peer: bytes, message: bytes) -> None:
        """Send to a peer that is connected, without waiting."""
        try:
            self._connections[peer].send(message)
        except BlockingIOError:
            pass
        except OSError:
            self.drop(peer)

    def drop(self, peer: bytes) -> None:
        if (connection := self._connections.pop(peer, None)) is not None:
            del self._peers[connection.fileno()]
            self._news.unregister(connection)  # a child that was just forked keeps it open for a moment
            connection.close()

    def close(self) -> None:
        for peer in list(self._connections):
            self.drop(peer)
        if self._listener is not None:
            self._listener.close()
        self._news.close()

    def _listen(self, segment: str) -> socket.socket:
        listener = _socket()
        try:
            listener.bind(_address(segment))
        except OSError as error:
            listener.close()
            self._news.close()
            raise StartupError(f"segment {segment}: another process takes its messages ({error.strerror})") from error
        listener.listen(BACKLOG)
        self._news.register(listener, select.EPOLLIN)
        return listener

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # that no file descriptors are left, say: whoever calls waits for one
            self._add(next(self._callers), listener.accept()[0])

    def _add(self, peer: bytes, connection: socket.socket) -> None:
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, user, _ = _CREDENTIALS.unpack(found)
        if user != os.getuid():
            connection.close()
            return
        connection.setblocking(False)
        self._news.register(connection, select.EPOLLIN)
        self._connections[peer], self._peers[connection.fileno()] = connection, peer


def _receive(connection: socket.socket) -> bytes:
    """The next message, cut where none may be longer; nothing when the other end is gone."""
    try:
        return connection.recv(MAX_HEADER_BYTES + 1)
    except ConnectionResetError:  # once, where the other end left messages unread: what it has sent comes behind
        return _receive(connection)
    except OSError:
        return b""


def _socket() -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.setblocking(False)
    return end


def _address(segment: str) -> bytes:
    return b"\0splitserve-" + hashlib.blake2b(segment.encode(), digest_size=16).hexdigest().encode()
