"""What torch does not offer of the CUDA driver: calls by name, and tensors over memory that somebody else owns."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch


def call(name: str, *arguments: Any) -> str:
    """The name of the error, or an empty text."""
    code: int = _function(name)(*arguments)
    if not code:
        return ""
    text = ctypes.c_char_p()
    _function("cuGetErrorName")(code, ctypes.byref(text))
    return (text.value or str(code).encode()).decode()


def check(name: str, *arguments: Any) -> None:
    if fault := call(name, *arguments):
        raise RuntimeError(f"{name}: {fault}")


def view(address: int, size: int) -> torch.Tensor:
    """uint8 [size] at `address`, without a copy, on the GPU that its memory is on or was registered with."""
    return torch.as_tensor(_Bytes(address, size))  # naming another device than the memory's would copy it


def copy_async(target: int, source: int, size: int, stream: torch.cuda.Stream) -> None:
    """Copy `size` bytes between addresses, which may be another GPU's: torch would make a context there first."""
    check("cuMemcpyAsync", target, source, size, stream.cuda_stream)


@lru_cache
def _function(name: str) -> Any:
    function = getattr(ctypes.CDLL("libcuda.so.1"), name)
    if name == "cuMemcpyAsync":  # called for every frame, with numbers as they are
        function.argtypes = ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
    return function


class _Bytes:
    """What torch makes a tensor of, without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
