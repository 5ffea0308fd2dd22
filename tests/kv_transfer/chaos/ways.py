"""The ways that KV takes in a chaos run: those of a cluster's ranks, and links that need no GPU where there is none."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from queue import SimpleQueue

import torch
from torch._C._distributed_c10d import Store

from splitserve.cluster.messages import RankEndpoint
from splitserve.cluster.segment_files import sweep
from splitserve.engine.group import host_store, join_store
from splitserve.kv_transfer.by_device import new_host_sender, new_linked_receiver, new_segment
from splitserve.kv_transfer.linked_receiver import LinkedReceiver
from splitserve.kv_transfer.linked_sender import LinkedSender
from splitserve.kv_transfer.links import Pair, Transit
from splitserve.kv_transfer.nccl import PAIR_BYTES
from splitserve.kv_transfer.segments import HostSender, SegmentReceiver
from splitserve.kv_transfer.shm import host_id
from splitserve.kv_transfer.tcp import TcpReceiver, TcpSender
from splitserve.kv_transfer.transport import ReceiverTransport
from tests.kv_transfer.chaos.setup import HOST, MAX_LINKS, Setup

MEET_S = 5.0
GARBLED = 50


def sending(setup: Setup, device: torch.device) -> tuple[HostSender, LinkedSender | None]:
    """As a prefill rank has it, but with links that need no GPU where there is none."""
    control = TcpSender(time.monotonic)
    if setup.transport == "nccl" and device.type == "cpu":
        linked = LinkedSender(control, device, _join, MAX_LINKS, time.monotonic)
        return Garbling(HostSender(linked, host_id(), {}, time.monotonic), device), linked
    sender = new_host_sender(control, device, MAX_LINKS * PAIR_BYTES)
    return Garbling(sender, device), sender._control if isinstance(sender._control, LinkedSender) else None


def receiving(setup: Setup, device: torch.device) -> tuple[ReceiverTransport, LinkedReceiver | None, RankEndpoint]:
    """As a decode rank has it, but with links that need no GPU where there is none."""
    control = TcpReceiver(HOST)
    endpoint = RankEndpoint(control.endpoint, setup.transport, host_id(), "", 0, 0)
    if setup.transport == "tcp":
        return control, None, endpoint
    on_host = setup.transport == "shm" or device.type == "cpu"
    if on_host:
        sweep(setup.cluster)
    segment = new_segment("shm" if on_host else setup.transport, setup.cluster, setup.staging_bytes, device)
    endpoint = replace(endpoint, segment=segment.name)
    if setup.transport != "nccl":
        return SegmentReceiver(control, segment), None, endpoint
    if on_host:
        store, link = host_store(HOST, MEET_S)
        meet = partial(_meet, store)
        linked = LinkedReceiver(control, segment.bytes, meet, MAX_LINKS, time.monotonic)
    else:
        linked, link = new_linked_receiver(control, segment, device, MAX_LINKS * PAIR_BYTES, HOST)
    return SegmentReceiver(linked, segment), linked, replace(endpoint, link=link)


class Garbling(HostSender):
    """`sender`, which now damages one payload in GARBLED: those that lie on `device` or the host."""

    def __init__(self, sender: HostSender, device: torch.device) -> None:
        vars(self).update(vars(sender))
        self._reached = {device, torch.device("cpu")}

    def send(self, target: RankEndpoint, header: bytes, payload: torch.Tensor | None = None, offset: int = 0) -> None:
        if payload is not None and payload.device in self._reached and not random.randrange(GARBLED):
            payload[-1] ^= 0xFF
            if payload.is_cuda:
                torch.cuda.current_stream(payload.device).synchronize()
        super().send(target, header, payload, offset)


Job = tuple[Callable[[memoryview], None], torch.Tensor, threading.Event]


class Crossing:
    def __init__(self, done: threading.Event) -> None:
        self.is_completed = done.is_set


class SocketPair:
    """A communicator of two processes: like NCCL's, it falls silent when its other end is gone."""

    def __init__(self, stream: socket.socket) -> None:
        stream.settimeout(None)
        self._stream, self._jobs = stream, SimpleQueue[Job | None]()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def send(self, payload: torch.Tensor) -> Transit:
        return self._begin(self._stream.sendall, payload)

    def receive(self, place: torch.Tensor) -> Transit:
        return self._begin(self._fill, place)

    def abort(self) -> None:
        self._jobs.put(None)
        with contextlib.suppress(OSError):  # the other end was faster
            self._stream.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._stream.close()

    def _begin(self, run: Callable[[memoryview], None], tensor: torch.Tensor) -> Transit:
        done = threading.Event()
        self._jobs.put((run, tensor, done))
        return Crossing(done)

    def _fill(self, place: memoryview) -> None:
        while place:
            if not (count := self._stream.recv_into(place)):
                raise ConnectionError("the other end is gone")
            place = place[count:]

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            run, tensor, done = job
            try:
                run(tensor.numpy().data)
            except OSError:
                return
            done.set()


def _join(endpoint: str, token: str) -> Pair:
    """The sender's end."""
    port = int(join_store(endpoint, MEET_S).get(token))
    return SocketPair(socket.create_connection((HOST, port), MEET_S))


def _meet(store: Store, token: str) -> Pair:
    """The receiver's end."""
    with socket.create_server((HOST, 0)) as listener:
        listener.settimeout(MEET_S)
        store.set(token, str(listener.getsockname()[1]))
        return SocketPair(listener.accept()[0])
