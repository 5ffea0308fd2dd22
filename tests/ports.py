"""Ports for tests, which no other program takes in the seconds before a router listens there."""

from __future__ import annotations

import itertools
import os
import socket

FIRST, COUNT = 20_000, 12_000  # above those of Ray's workers, below those that Linux gives to outgoing connections
STEP = 4  # the replicas of a router listen on the ports after its own
_offsets = itertools.count(os.getpid() * 100 * STEP, STEP)  # processes that test side by side begin apart


def free_port() -> int:
    """A port of this host where nobody listens, nor on the next; another one each time."""
    return next(port for port in (FIRST + offset % COUNT for offset in _offsets) if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as one, socket.socket() as next_to_it:
        try:
            one.bind(("127.0.0.1", port))
            next_to_it.bind(("127.0.0.1", port + 1))
        except OSError:
            return False
    return True
