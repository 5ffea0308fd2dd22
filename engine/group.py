"""The tensor-parallel group of one engine: collectives between its ranks, and the leader's command stream.

    leader (TP rank 0)                       follower (TP rank r)
      LeaderLink  == step n, command ======>  FollowerLink      every rank executes the same commands in order
                  <======== report ========
      GlooGroup / NcclGroup <== all_reduce, all_gather ==>      inside the commands

Both are private to the engine: there is no default process group, and nothing listens beyond the given address.
"""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import zmq
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from splitserve.cluster.channel import CurveKeys, bind, secure
from splitserve.cluster.codec import pack, unpack
from splitserve.cluster.errors import ProtocolError, StartupError, WorkerUnavailable

_HELLO = b"hello"
_STEP_BYTES = 8


def host_store(address: str, timeout_s: float) -> tuple[TCPStore, str]:
    """The leader's rendezvous on a free port of `address`, and the "host:port" to `join_store` from other ranks."""
    try:
        # TCPStore by itself listens on every interface: hand it a socket that does not. It owns the descriptor then.
        listener = socket.create_server((address, 0), family=_family(address))
    except OSError as error:
        raise StartupError(f"cannot bind {address}: {error.strerror}; name an address of this host") from error
    port = listener.getsockname()[1]
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(
        address, port, None, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, f"{address}:{port}"


def join_store(endpoint: str, timeout_s: float) -> TCPStore:
    """Connect to the store of `host_store`. Raises StartupError when nobody answers within `timeout_s`."""
    host, _, port = endpoint.rpartition(":")
    try:
        return TCPStore(host, int(port), None, is_master=False, timeout=timedelta(seconds=timeout_s))
    except dist.DistError as error:
        raise StartupError(f"nobody answers at {endpoint} within {timeout_s:g} s") from error


class GlooGroup:
    """Collectives between the CPU ranks of one engine (the `TensorParallel` of models/layers.py).

    Sums are taken in rank order, in float32 at least, so that an element's bits do not depend on its place in the
    tensor; gloo's own ring reduction adds in an order that does.
    """

    def __init__(self, store: Store, rank: int, size: int, address: str, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=timeout_s)
        self._group = gloo(PrefixStore("gloo", store), rank, size, options)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, in x's dtype. Raises RuntimeError when a rank is gone or late."""
        first, *others = self._gather(x)
        total = first.to(torch.promote_types(x.dtype, torch.float32))
        for part in others:
            total += part
        return total.to(x.dtype)

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Every rank's `x`, concatenated in rank order along `dim`."""
        return torch.cat(self._gather(x), dim)

    def _gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        self._group.allgather([parts], [x.contiguous()]).wait()
        return parts


class NcclGroup:
    """Collectives between the GPU ranks of one engine. Results are ready in the order of the current stream."""

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = timedelta(seconds=timeout_s)
        self._group = nccl(PrefixStore("nccl", store), rank, size, options)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, which may be overwritten."""
        x = x.contiguous()
        self._group.allreduce([x]).wait()
        return x

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Every rank's `x`, concatenated in rank order along `dim`."""
        gathered = x.new_empty(self.size, *x.shape)
        self._group._allgather_base(gathered, x.contiguous()).wait()
        return torch.cat(gathered.unbind(0), dim)


class LeaderLink:
    """The leader's end of the command stream; commands are numbered from 0. Not thread-safe."""

    def __init__(self, followers: int, bind_address: str, keys: CurveKeys | None = None) -> None:
        self.followers = followers
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        secure(self.socket, keys, server=True)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.address = bind(self.socket, bind_address)
        self._next_step = 0

    def wait_for_followers(self, timeout_s: float) -> None:
        """Return once every follower is connected. Raises StartupError naming those that are not in time."""
        deadline = time.monotonic() + timeout_s
        missing = set(range(1, self.followers + 1))
        while missing:
            if not self.socket.poll(max(0, int(1000 * (deadline - time.monotonic())))):
                raise StartupError(f"TP ranks {sorted(missing)} did not join within {timeout_s:g} s; see their logs")
            identity, hello = self.socket.recv_multipart()
            if hello != _HELLO:
                raise ProtocolError(f"TP rank {_rank_of(identity)} sent a report before it joined")
            missing.discard(_rank_of(identity))

    def send(self, command: object) -> None:
        """Send the next command to every follower. Raises WorkerUnavailable when one is gone."""
        frames = [self._next_step.to_bytes(_STEP_BYTES, "big"), pack(command)]
        for rank in range(1, self.followers + 1):
            try:
                self.socket.send_multipart([_identity(rank), *frames], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                raise WorkerUnavailable(f"TP rank {rank} is gone: {error.strerror}") from error
        self._next_step += 1

    def reports(self) -> list[tuple[int, Any]]:
        """What followers reported since the last call, as (rank, message). Raises ProtocolError for malformed ones."""
        reports = []
        while self.socket.poll(0):
            identity, data = self.socket.recv_multipart()
            reports.append((_rank_of(identity), unpack(data)))
        return reports

    def close(self) -> None:
        self.socket.close(linger=0)


class FollowerLink:
    """TP rank `rank`'s end of the command stream. Not thread-safe."""

    def __init__(self, address: str, rank: int, keys: CurveKeys | None = None) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        secure(self.socket, keys, server=False)
        self.socket.setsockopt(zmq.IDENTITY, _identity(rank))
        self.socket.connect(address)
        self.socket.send(_HELLO)
        self._next_step = 0

    def receive(self, timeout_s: float) -> Any | None:
        """The next command, or None after `timeout_s`. Raises ProtocolError when one is missing, doubled or malformed.

        That error is fatal: this rank no longer does what its group does, and the whole engine must restart.
        """
        if not self.socket.poll(int(1000 * timeout_s)):
            return None
        frames = self.socket.recv_multipart()
        if len(frames) != 2:
            raise ProtocolError(f"a command of {len(frames)} frames, expected 2")
        step = int.from_bytes(frames[0], "big")
        if step != self._next_step:
            raise ProtocolError(f"command {step} came where {self._next_step} was due")
        self._next_step += 1
        return unpack(frames[1])

    def report(self, item: object) -> None:
        """Tell the leader something."""
        self.socket.send(pack(item))

    def close(self) -> None:
        self.socket.close(linger=0)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _identity(rank: int) -> bytes:
    return b"tp%d" % rank


def _rank_of(identity: bytes) -> int:
    if not identity.startswith(b"tp") or not identity[2:].isdigit():
        raise ProtocolError(f"a stranger named {identity[:40]!r} on the engine's command stream")
    return int(identity[2:])
