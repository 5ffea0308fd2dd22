"""The processes of a chaos run, as the conductor has them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch
import zmq

from tests.kv_transfer.chaos.rank import GAUGES, RESUMES, run_rank
from tests.kv_transfer.chaos.setup import HOST, RankState, Setup

# What ranks import is there before they are forked, so that another one is soon in a dead one's place.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.kv_transfer.chaos.rank"])


@dataclass(eq=False)
class Member:
    """A rank's process.

    `address` is None until it is ready, `resume_at` while it is not stopped; `lost_peers` of the other side died in
    its life.
    """

    side: str
    number: int
    process: ForkServerProcess
    socket: zmq.Socket[bytes]
    gauges: Any
    address: str | None = None
    resume_at: float | None = None
    killed: bool = False
    lost_peers: int = 0
    state: RankState | None = None

    def tell(self, *message: object) -> None:
        with contextlib.suppress(zmq.ZMQError):  # it is gone
            self.socket.send_pyobj(message, zmq.NOBLOCK)

    def stop(self, seconds: float) -> None:
        self.resume_at = time.monotonic() + seconds
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.resume_at = None
        self.gauges[RESUMES] += 1
        with contextlib.suppress(ProcessLookupError):  # it was killed meanwhile
            self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self.killed = True
        self.process.kill()

    def _signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    @property
    def is_well(self) -> bool:
        return self.address is not None and self.resume_at is None


def start_member(setup: Setup, side: str, number: int) -> Member:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.sndhwm = socket.rcvhwm = 0
    port, gauges = socket.bind_to_random_port(f"tcp://{HOST}"), CONTEXT.RawArray("d", len(GAUGES))
    arguments = (setup, side, torch.device(setup.devices[side][number]), f"tcp://{HOST}:{port}", gauges)
    process = CONTEXT.Process(target=run_rank, args=arguments, daemon=True)
    process.start()
    return Member(side, number, process, socket, gauges)
