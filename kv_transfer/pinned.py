"""Segments in shared memory that a GPU's copy engines read and write themselves, at the speed of its bus."""

from __future__ import annotations

import ctypes

import torch

from splitserve.cluster.errors import InsufficientResources, TransferFailed
from splitserve.cluster.topology import BOUNCE_BYTES
from splitserve.kv_transfer.cuda_driver import call, check
from splitserve.kv_transfer.segments import Unreachable
from splitserve.kv_transfer.shm import ShmMapping, ShmSegment
from splitserve.kv_transfer.staging import FrameSizes

FRAMES = FrameSizes(4 << 20, 16 << 20)
PORTABLE = 1  # pinned for all GPUs of this process


class PinnedSegment(ShmSegment):
    """A receiver's staging area for pages on `device`. Raises InsufficientResources where it cannot be pinned."""

    def __init__(self, cluster: str, size: int, device: torch.device) -> None:
        super().__init__(cluster, size)
        try:
            _pin(self.bytes, device)
        except InsufficientResources:
            super().close()
            raise

    def take(self, offset: int, size: int) -> torch.Tensor:
        """No copy: movers on a GPU read every word once, and sum what they have read."""
        if size > BOUNCE_BYTES:
            raise TransferFailed(f"payload: found {size} bytes; a GPU takes {BOUNCE_BYTES} at most")
        return self.bytes.narrow(0, offset, size)

    def close(self) -> None:
        _unpin(self.bytes)
        super().close()


class PinnedMapping(ShmMapping):
    """Another process's segment, as `device` reaches it. Raises TransferFailed as ShmMapping does, or Unreachable."""

    frame_sizes = FRAMES

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__(name)
        self._device = device
        try:
            _pin(self.bytes, device)
        except InsufficientResources as error:
            raise Unreachable(str(error)) from error

    def close(self) -> None:
        torch.cuda.synchronize(self._device)  # nothing of this process writes there any more
        _unpin(self.bytes)


def _pin(host: torch.Tensor, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the context that the memory is pinned for
        size = ctypes.c_size_t(host.numel())
        if fault := call("cuMemHostRegister_v2", ctypes.c_void_p(host.data_ptr()), size, PORTABLE):
            raise InsufficientResources(f"staging: {host.numel()} bytes of host memory cannot be pinned ({fault})")


def _unpin(host: torch.Tensor) -> None:
    check("cuMemHostUnregister", ctypes.c_void_p(host.data_ptr()))
