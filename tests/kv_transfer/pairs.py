"""Communicators of two ends within one process, which a test can stop, break and watch."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

import torch


@dataclass(eq=False)
class Crossing:
    """One end of a payload's way."""

    tensor: torch.Tensor
    done: bool = False

    def is_completed(self) -> bool:
        return self.done


@dataclass
class _Wire:
    sends: deque[Crossing] = field(default_factory=deque)
    receives: deque[Crossing] = field(default_factory=deque)


class FakePair:
    def __init__(self, exchange: Exchange, wire: _Wire) -> None:
        self._exchange, self._wire, self.aborted = exchange, wire, False

    def send(self, payload: torch.Tensor) -> Crossing:
        return self._add(self._wire.sends, payload)

    def receive(self, place: torch.Tensor) -> Crossing:
        return self._add(self._wire.receives, place)

    def abort(self) -> None:
        self.aborted = True

    def _add(self, queue: deque[Crossing], tensor: torch.Tensor) -> Crossing:
        if self._exchange.broken:
            raise RuntimeError("the communicator is broken")
        queue.append(crossing := Crossing(tensor))
        self._match()
        return crossing

    def _match(self) -> None:
        """What is posted on both ends crosses, in order, unless the exchange is stuck."""
        wire = self._wire
        while wire.sends and wire.receives and not self._exchange.stuck:
            sent, received = wire.sends.popleft(), wire.receives.popleft()
            received.tensor.copy_(sent.tensor)
            sent.done = received.done = True


class Exchange:
    """Where pairs are made: `meet` returns when both ends have come for a token, or raises after `patience_s`."""

    def __init__(self, patience_s: float = 5.0) -> None:
        self.pairs: list[FakePair] = []
        self.stuck = self.broken = False
        self._patience_s = patience_s
        self._waiting: dict[str, tuple[threading.Barrier, _Wire]] = {}
        self._lock = threading.Lock()

    def meet(self, token: str) -> FakePair:
        with self._lock:
            barrier, wire = self._waiting.setdefault(token, (threading.Barrier(2), _Wire()))
        barrier.wait(self._patience_s)
        pair = FakePair(self, wire)
        self.pairs.append(pair)
        return pair
