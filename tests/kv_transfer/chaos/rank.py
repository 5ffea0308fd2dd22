"""The ranks of a chaos run: processes with one end of KV transfers each, which the conductor tells:

    conductor                     target                       source
      | open(id) ------------------->|
      |<--- granted(id, ticket) | busy(id)
      | begin(ticket) ------------------------------------------->|
      |                              |<========== KV ============>|
      |<--------- verified(id) | failed(id, reason)               |
      |<------------------------- sent(id, linked) | stopped(id, reason)

An id is "request/attempt", and the KV of a request follows from its number: any source has it, any target knows it.
"""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import torch
import zmq

from splitserve.cluster.channel import wait
from tests.kv_transfer.chaos.ends import SourceRank, TargetRank
from tests.kv_transfer.chaos.setup import Setup, threads_and_files

WARM_TRANSFERS = 10
IDLE_WAIT_MS = 5
GAUGES = FRAMES, LONGEST_PASS, RESUMES = range(3)  # they outlive the rank; the conductor counts the last


class Passes:
    """Keeps the gauges of a rank's loop: frames under way, and the longest pass while the process was not stopped."""

    def __init__(self, gauges: Any) -> None:
        self._gauges, self._began, self._resumes = gauges, time.monotonic(), 0.0

    def end(self, frames: int) -> None:
        # In this order: a stop may come between any two lines, and its pass must not count.
        now, resumes, self._gauges[FRAMES] = time.monotonic(), self._gauges[RESUMES], frames
        if resumes == self._resumes:
            self._gauges[LONGEST_PASS] = max(self._gauges[LONGEST_PASS], now - self._began)
        self._began, self._resumes = time.monotonic(), resumes


def run_rank(setup: Setup, side: str, device: torch.device, conductor: str, gauges: Any) -> None:
    """A rank's process."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.sndhwm = 0
    socket.connect(conductor)
    rank = (SourceRank if side == "source" else TargetRank)(setup, device, lambda *message: socket.send_pyobj(message))
    socket.send_pyobj(("ready", rank.address))
    _serve(rank, socket, gauges)
    rank.close()
    socket.close(linger=1000)


def _serve(rank: SourceRank | TargetRank, socket: zmq.Socket[bytes], gauges: Any) -> None:
    """Until the conductor says stop, or is gone."""
    passes, ended, warm, parent = Passes(gauges), 0, None, multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        while socket.poll(0):
            message = socket.recv_pyobj()
            if message == ("stop",):
                return
            if message == ("state",):
                socket.send_pyobj(("state", rank.state(warm)))
            else:
                rank.handle(message)
        ended += rank.poll()
        if warm is None and ended >= WARM_TRANSFERS and rank.is_linked:
            warm = threads_and_files()
        passes.end(rank.frames)
        if not rank.busy:
            wait([socket, *rank.sockets], IDLE_WAIT_MS)
