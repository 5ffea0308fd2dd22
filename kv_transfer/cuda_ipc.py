"""Staging in a GPU's memory that other processes of the host write into, through the driver's IPC handles.

Torch's own way of sharing reference-counts through files and pickled descriptions; here a handle is 64 bytes in a
name, and memory belongs to its `CudaSegment` alone.
"""

from __future__ import annotations

import ctypes
import re

import torch

from splitserve.cluster.errors import InsufficientResources, TransferFailed
from splitserve.kv_transfer.cuda_driver import call, check, view
from splitserve.kv_transfer.segments import Unreachable
from splitserve.kv_transfer.staging import FrameSizes

FRAMES = FrameSizes(16 << 20, 64 << 20)
BLOCK_BYTES = 2 << 20  # what the driver allocates at once: smaller memory shares its block, and the handle, with others
HANDLE_BYTES = 64
LAZY_PEER_ACCESS = 1
NO_WAY = {"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_TOO_MANY_PEERS"}
_NAME = re.compile(rf"cuda-(?P<handle>[0-9a-f]{{{2 * HANDLE_BYTES}}})")


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * HANDLE_BYTES),)


class CudaSegment:
    """A receiver's staging area on `device`: `bytes` uint8 [size], and the `name` that another process attaches.

    Raises InsufficientResources when the GPU has no room for `size` bytes.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._address = ctypes.c_uint64()
        handle, whole = _Handle(), -(-size // BLOCK_BYTES) * BLOCK_BYTES
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # the driver's calls need the context that this makes
            if fault := call("cuMemAlloc_v2", ctypes.byref(self._address), ctypes.c_size_t(whole)):
                raise InsufficientResources(f"staging: {device} has no room for {size} bytes ({fault})")
            check("cuIpcGetMemHandle", ctypes.byref(handle), self._address)
            self.bytes = view(self._address.value, size)
        self.name = f"cuda-{bytes(handle.reserved).hex()}"

    def take(self, offset: int, size: int) -> torch.Tensor:
        """No copy: movers on a GPU read every word once, and sum what they have read."""
        return self.bytes.narrow(0, offset, size)

    def close(self) -> None:
        check("cuMemFree_v2", self._address)


class CudaMapping:
    """Another process's segment, as this process's `device` reaches it: `bytes` uint8 [its size], on the GPU it is on.

    Raises TransferFailed when `name` is no segment's, or its process is gone; Unreachable when `device` has no way
    to that GPU.
    """

    frame_sizes = FRAMES

    def __init__(self, name: str, device: torch.device) -> None:
        match = _NAME.fullmatch(name)
        if match is None:
            raise TransferFailed(f"segment: found {name!r}; that is no name of a segment")
        handle = _Handle.from_buffer_copy(bytes.fromhex(match["handle"]))
        self._address = ctypes.c_uint64()
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        with torch.cuda.device(device):
            torch.cuda.current_stream()
            fault = call("cuIpcOpenMemHandle_v2", ctypes.byref(self._address), handle, LAZY_PEER_ACCESS)
            if fault:
                failure = Unreachable if fault in NO_WAY else TransferFailed
                raise failure(f"segment: {name[:16]}... cannot be opened on {device} ({fault})")
            check("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), self._address)
            self.bytes = view(self._address.value, size.value)
        self._device = device

    def close(self) -> None:
        torch.cuda.synchronize(self._device)  # nothing of this process writes there any more
        check("cuIpcCloseMemHandle", self._address)
