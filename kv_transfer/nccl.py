"""Pairs of GPUs over NCCL: a communicator of two ranks, with a store of its own and no group around it."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from splitserve.cluster.errors import TransferFailed
from splitserve.engine.group import join_store
from splitserve.kv_transfer.links import Pair, Transit

CHANNELS = 8
PAIR_BYTES = 68 << 20  # of each GPU, with 8 channels
MEET_S = 20.0
SENDER, RECEIVER = 0, 1
# Torch's own watchdog would end the process where a peer is late; ours ends the link.
NO_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


class NcclPair:
    def __init__(self, group: Any, rank: int, device: torch.device) -> None:
        self._group, self._peer = group, 1 - rank
        # Payloads are whole when they are sent: nothing that the engine has launched is waited for.
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, payload: torch.Tensor) -> Transit:
        with torch.cuda.stream(self._stream):
            transit: Transit = self._group.send([payload], self._peer, 0)
            return transit

    def receive(self, place: torch.Tensor) -> Transit:
        with torch.cuda.stream(self._stream):
            transit: Transit = self._group.recv([place], self._peer, 0)
            return transit

    def abort(self) -> None:
        self._group.abort()


def join(endpoint: str, token: str, device: torch.device) -> Pair:
    """The sender's end of a pair, met at the receiver's store. Raises as `meet`; StartupError where none answers."""
    return meet(join_store(endpoint, MEET_S), token, SENDER, device)


def meet(store: Store, token: str, rank: int, device: torch.device, channels: int = CHANNELS) -> Pair:
    """Make a pair as `rank`, with the process that does so as the other one under the same `token` of one store.

    Blocks for up to MEET_S seconds, then raises TransferFailed.
    """
    os.environ.update(NO_WATCHDOG)
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timedelta(seconds=MEET_S)
    options.config.max_ctas = channels
    options.is_high_priority_stream = True  # its few programs go before the engine's many
    with torch.cuda.device(device):
        pair = NcclPair(nccl(PrefixStore(token, store), rank, 2, options), rank, device)
        greeting = torch.zeros(8, dtype=torch.uint8, device=device)
        torch.cuda.current_stream().synchronize()
        transit = pair.send(greeting) if rank == SENDER else pair.receive(greeting)
        deadline = time.monotonic() + MEET_S
        while not transit.is_completed():
            if time.monotonic() > deadline:
                pair.abort()
                raise TransferFailed(f"no greeting within {MEET_S:g} s")
            time.sleep(0.001)
    return pair
