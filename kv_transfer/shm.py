"""KV between processes of one host: payloads in a file of the receiver's that both map, headers over TCP.

The file is our own in /dev/shm: `multiprocessing.shared_memory` would unlink it when an attached process exits.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import re
import secrets
from pathlib import Path

import torch

from splitserve.cluster.channel import Socket
from splitserve.cluster.errors import InsufficientResources, TransferFailed
from splitserve.cluster.messages import RankEndpoint
from splitserve.kv_transfer.tcp import TcpReceiver, TcpSender
from splitserve.kv_transfer.transport import Arrival

FOLDER = Path("/dev/shm")
_NAME = r"splitserve-{cluster}-(?P<pid>[0-9]+)-[0-9a-f]{{8}}"
_ANY_NAME = re.compile(_NAME.format(cluster="[A-Za-z0-9._-]+"))


class ShmSegment:
    """A receiver's staging area: a file that only its user may open, unlinked by `close`.

    The open file is locked while its process lives, so that `sweep` can tell a leftover. Raises
    InsufficientResources when /dev/shm has no room for `size` bytes.
    """

    def __init__(self, cluster: str, size: int) -> None:
        self.name = f"splitserve-{cluster}-{os.getpid()}-{secrets.token_hex(4)}"
        self._file = os.open(FOLDER / self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            # Without the pages behind it, a full /dev/shm would kill the process at its first write.
            os.posix_fallocate(self._file, 0, size)
            self.bytes = _map(self._file, size)
        except OSError as error:
            self.close()
            raise InsufficientResources(f"staging: {FOLDER} has no room for {size} bytes ({error.strerror})") from error

    def close(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            (FOLDER / self.name).unlink()
        os.close(self._file)


def sweep(cluster: str) -> list[str]:
    """Remove what dead processes of `cluster` left in /dev/shm. Returns the names of the files removed."""
    pattern = re.compile(_NAME.format(cluster=re.escape(cluster)))
    removed = []
    for path in sorted(FOLDER.glob("splitserve-*")):
        match = pattern.fullmatch(path.name)
        if match and _is_left_over(path, match["pid"]):
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed


def host_id() -> str:
    """The same for exactly those processes that share a /dev/shm."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return hashlib.blake2b(f"{boot}:{FOLDER.stat().st_dev}".encode(), digest_size=8).hexdigest()


class ShmReceiver:
    """Takes frames whose payload lies in `segment`, and those that bring theirs along from another host."""

    def __init__(self, control: TcpReceiver, segment: ShmSegment) -> None:
        self._control, self._segment = control, segment
        self._private = torch.empty(0, dtype=torch.uint8)

    def receive(self, limit: int) -> list[Arrival]:
        return self._control.receive(limit)

    @property
    def sockets(self) -> list[Socket]:
        return self._control.sockets

    def take(self, arrival: Arrival, offset: int, size: int) -> torch.Tensor:
        if arrival.payload is not None:
            return self._control.take(arrival, offset, size)
        # Copied before it is checked: a sender given up for dead may still write to the segment.
        if size > self._private.numel():
            self._private = torch.empty(size, dtype=torch.uint8)
        return self._private[:size].copy_(self._segment.bytes[offset : offset + size])

    def send(self, peer: bytes, header: bytes) -> None:
        self._control.send(peer, header)

    def close(self) -> None:
        self._control.close()
        self._segment.close()


class HostSender:
    """Sends through shared memory to targets of this host that offer it, and over TCP to all others."""

    def __init__(self, control: TcpSender, host: str) -> None:
        self._control, self._host = control, host
        self._mapped: dict[str, torch.Tensor] = {}

    def connect(self, target: RankEndpoint) -> None:
        self._control.connect(target)
        if self._shares_memory(target):
            self._staging(target.segment)

    def place(self, target: RankEndpoint, offset: int, size: int) -> torch.Tensor:
        if not self._shares_memory(target):
            return self._control.place(target, offset, size)
        staging = self._staging(target.segment)
        if offset + size > staging.numel():
            raise TransferFailed(
                f"segment: {target.segment} has {staging.numel()} bytes; a frame ends at {offset + size}"
            )
        return staging[offset : offset + size]

    def send(self, target: RankEndpoint, header: bytes, payload: torch.Tensor | None = None) -> None:
        self._control.send(target, header, None if self._shares_memory(target) else payload)

    def receive(self) -> list[bytes]:
        return self._control.receive()

    @property
    def sockets(self) -> list[Socket]:
        return self._control.sockets

    def close(self) -> None:
        self._control.close()
        self._mapped.clear()

    def _shares_memory(self, target: RankEndpoint) -> bool:
        return target.transport == "shm" and target.host == self._host

    def _staging(self, name: str) -> torch.Tensor:
        if name not in self._mapped:
            # A mapping keeps the memory of a receiver that is gone.
            self._mapped = {known: staging for known, staging in self._mapped.items() if (FOLDER / known).exists()}
            self._mapped[name] = attach(name)
        return self._mapped[name]


def attach(name: str) -> torch.Tensor:
    """Map another process's segment: uint8 [its size]. Raises TransferFailed when it is not there or not ours."""
    if not _ANY_NAME.fullmatch(name):
        raise TransferFailed(f"segment: found {name!r}; that is no name of a segment")
    try:
        file = os.open(FOLDER / name, os.O_RDWR | os.O_NOFOLLOW)
    except OSError as error:
        raise TransferFailed(f"segment: {name} cannot be opened ({error.strerror})") from error
    try:
        status = os.fstat(file)
        if status.st_uid != os.getuid():
            raise TransferFailed(f"segment: {name} belongs to user {status.st_uid}")
        return _map(file, status.st_size)
    finally:
        os.close(file)


def _map(file: int, size: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)


def _is_left_over(path: Path, pid: str) -> bool:
    """Whether the maker is dead: it neither runs nor, as in another container of this host, holds the lock."""
    if Path("/proc", pid).exists():
        return False
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True
