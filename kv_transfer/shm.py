"""Segments in shared memory: a file that the receiving and the sending process map.

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

from splitserve.cluster.errors import InsufficientResources, TransferFailed
from splitserve.kv_transfer.staging import HOST_FRAMES

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
            self._taken = torch.empty(0, dtype=torch.uint8)
        except OSError as error:
            self.close()
            raise InsufficientResources(f"staging: {FOLDER} has no room for {size} bytes ({error.strerror})") from error

    def take(self, offset: int, size: int) -> torch.Tensor:
        """A copy, since movers in host memory read twice, and a sender given up for dead may still write here."""
        if size > self._taken.numel():
            self._taken = torch.empty(size, dtype=torch.uint8)
        return self._taken[:size].copy_(self.bytes[offset : offset + size])

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


class ShmMapping:
    """Another process's segment. Raises TransferFailed when it is not there or not ours."""

    frame_sizes = HOST_FRAMES

    def __init__(self, name: str) -> None:
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
            self.bytes = _map(file, status.st_size)
        except (OSError, ValueError) as error:
            raise TransferFailed(f"segment: {name} cannot be mapped ({error})") from error
        finally:
            os.close(file)

    def close(self) -> None:
        """The memory goes with the last tensor of it."""


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
