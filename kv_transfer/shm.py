"""Segments in shared memory: a file that the receiving and the sending process map.

The file is our own in /dev/shm: `multiprocessing.shared_memory` would unlink it when an attached process exits.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
from pathlib import Path

import torch

from splitserve.cluster.errors import InsufficientResources, TransferFailed
from splitserve.cluster.segment_files import FOLDER, is_name, new_name
from splitserve.kv_transfer.staging import HOST_FRAMES


class ShmSegment:
    """A receiver's staging area: a file that only its user may open, unlinked by `close`.

    The open file is locked while its process lives, so that `sweep` can tell a leftover. Raises
    InsufficientResources when /dev/shm has no room for `size` bytes.
    """

    def __init__(self, cluster: str, size: int) -> None:
        self.name = new_name(cluster)
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


def host_id() -> str:
    """The same for exactly those processes that share a /dev/shm."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return hashlib.blake2b(f"{boot}:{FOLDER.stat().st_dev}".encode(), digest_size=8).hexdigest()


class ShmMapping:
    """Another process's segment. Raises TransferFailed when it is not there or not ours."""

    frame_sizes = HOST_FRAMES

    def __init__(self, name: str) -> None:
        if not is_name(name):
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
