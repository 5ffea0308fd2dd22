"""Segments in shared memory that a GPU reads and writes itself, at the speed of its bus."""

from __future__ import annotations

import ctypes

import torch

from splitserve.cluster.errors import InsufficientResources
from splitserve.kv_transfer.cuda_driver import call, check, view
from splitserve.kv_transfer.segments import Unreachable
from splitserve.kv_transfer.shm import ShmMapping, ShmSegment
from splitserve.kv_transfer.staging import FrameSizes

FRAMES = FrameSizes(4 << 20, 16 << 20)
DEVICE_MAP = 2  # so that kernels reach it


class PinnedSegment(ShmSegment):
    """A receiver's staging area for pages on `device`. Raises InsufficientResources where it cannot be pinned."""

    def __init__(self, cluster: str, size: int, device: torch.device) -> None:
        super().__init__(cluster, size)
        self._host = self.bytes
        try:
            self.bytes = _pinned(self._host, device)
        except InsufficientResources:
            super().close()
            raise

    def take(self, offset: int, size: int) -> torch.Tensor:
        """No copy: movers on a GPU read every word once, and sum what they have read."""
        return self.bytes.narrow(0, offset, size)

    def close(self) -> None:
        _unpin(self._host)
        super().close()


class PinnedMapping(ShmMapping):
    """Another process's segment, as `device` reaches it. Raises TransferFailed as ShmMapping does, or Unreachable."""

    frame_sizes = FRAMES

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__(name)
        self._host, self._device = self.bytes, device
        try:
            self.bytes = _pinned(self._host, device)
        except InsufficientResources as error:
            raise Unreachable(str(error)) from error

    def close(self) -> None:
        torch.cuda.synchronize(self._device)  # nothing of this process writes there any more
        _unpin(self._host)


def _pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the context that the memory is pinned for
        size = ctypes.c_size_t(host.numel())
        if fault := call("cuMemHostRegister_v2", ctypes.c_void_p(host.data_ptr()), size, DEVICE_MAP):
            raise InsufficientResources(f"staging: {host.numel()} bytes of host memory cannot be pinned ({fault})")
        return view(host.data_ptr(), host.numel())


def _unpin(host: torch.Tensor) -> None:
    check("cuMemHostUnregister", ctypes.c_void_p(host.data_ptr()))
