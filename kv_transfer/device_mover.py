"""Copies between a GPU's pages and payloads, by kernels on a stream of its own: the engine's own work goes on.

What a frame costs here is host time, a dozen microseconds for every call of torch's, so few are made.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from splitserve.cluster.topology import BOUNCE_BYTES
from splitserve.engine.kv_cache import KvCache
from splitserve.engine.to_device import to_device
from splitserve.kernels.kv_pack import KvRegion, PagedLayers, pack_kv, unpack_kv
from splitserve.kv_transfer.checksum import signed
from splitserve.kv_transfer.cuda_driver import copy_async
from splitserve.kv_transfer.mover import Mark
from splitserve.kv_transfer.packing import check_pages
from splitserve.kv_transfer.staging import HOST_FRAMES

# Of the GPU's, which one copy takes. Prefill's kernels fill all of them, and wait for those that pack: it is soon over.
# Decode's leave some free.
PACK_SMS, UNPACK_SMS = 64, 16
# Payloads for another GPU of these sizes are packed here first: its copy engines are faster across than SMs.
BOUNCES, SLOTS = 2, 1024
BOUNCED_BYTES = range(1 << 20, BOUNCE_BYTES // BOUNCES + 1)
HOST_PAYLOADS = 8  # at once, that travel with their messages
WORD_BYTES, WORD_STRIDE = 8, 2  # every 16 bytes, so that one compiled kernel does for every word


class DeviceMover:
    """Copies of one cache follow one another. A payload may lie on this GPU, on another that is mapped, or on the host.

    Payloads on the host go through pinned memory: `pack` fills them when it is asked for the sum.
    """

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache
        self._device = cache.layers[0].device
        self._layers = PagedLayers.of(cache.layers)
        self._stream, self._copies = _stream(self._device), _stream(self._device)
        self._bounces: list[_Bounce] = []
        words = torch.zeros(SLOTS, WORD_STRIDE, dtype=torch.int64, device=self._device)
        sums = torch.zeros(SLOTS, dtype=torch.int64, pin_memory=True)
        self._slots = itertools.cycle([_Slot(words[n, :1], sums[n : n + 1]) for n in range(SLOTS)])
        _fill_pinned_pool()
        torch.cuda.current_stream(self._device).synchronize()

    def mark(self) -> Mark:
        return _recorded(torch.cuda.current_stream(self._device))

    def passed(self, mark: Mark) -> bool:
        return mark is None or bool(mark.query())  # type: ignore[no-untyped-call]

    def table(self, pages: Sequence[int], stop_token: int) -> torch.Tensor:
        check_pages(self.cache, pages, stop_token)
        with torch.cuda.stream(self._stream):  # on another one it could come behind copies that need it
            return to_device(pages, self._device)

    def pack(self, table: torch.Tensor, region: KvRegion, payload: torch.Tensor) -> DeviceMove:
        with _current(self._device):
            if payload.is_cpu:
                return self._pack_for_host(table, region, payload)
            if payload.device == self._device or payload.numel() not in BOUNCED_BYTES:
                return self._run(pack_kv, PACK_SMS, table, region, payload)
            bounce = self._bounce()
            packed = bounce.bytes.narrow(0, 0, payload.numel())
            self._stream.wait_event(bounce.free)
            move = self._run(pack_kv, PACK_SMS, table, region, packed)
            self._copies.wait_event(move.done)
            copy_async(payload.data_ptr(), packed.data_ptr(), payload.numel(), self._copies)
            move.done.record(self._copies)
            bounce.free = move.done
            return move

    def unpack(self, table: torch.Tensor, region: KvRegion, payload: torch.Tensor, after: Mark) -> DeviceMove:
        with _current(self._device):
            if payload.is_cpu:
                with torch.cuda.stream(self._stream):
                    payload = payload.pin_memory().to(self._device, non_blocking=True)
            if after is not None:
                self._stream.wait_event(after)
            return self._run(unpack_kv, UNPACK_SMS, table, region, payload)

    def _pack_for_host(self, table: torch.Tensor, region: KvRegion, payload: torch.Tensor) -> DeviceMove:
        with torch.cuda.stream(self._stream):
            packed = torch.empty_like(payload, device=self._device)
            move = self._run(pack_kv, PACK_SMS, table, region, packed)
            staged = torch.empty_like(payload, pin_memory=True).copy_(packed, non_blocking=True)
            move.done.record(self._stream)
            move.fills = (payload, staged)
            return move

    def _run(
        self, kernel: Callable[..., None], sms: int, table: torch.Tensor, region: KvRegion, packed: torch.Tensor
    ) -> DeviceMove:
        slot = next(self._slots)
        move = slot.begin()
        kernel(self._layers, table, region, packed, slot.word, sms, self._stream)
        copy_async(*slot.to_host, WORD_BYTES, self._stream)
        move.done.record(self._stream)
        return move

    def _bounce(self) -> _Bounce:
        """The buffer that has waited longest."""
        if len(self._bounces) < BOUNCES:
            whole = torch.empty(BOUNCED_BYTES[-1], dtype=torch.uint8, device=self._device)
            bounce = _Bounce(whole, _recorded(torch.cuda.current_stream(self._device)))
        else:
            bounce = self._bounces.pop(0)
        self._bounces.append(bounce)
        return bounce


@dataclass
class _Bounce:
    """Memory for one payload, which the next one may take when `free` has passed."""

    bytes: torch.Tensor
    free: torch.cuda.Event


class _Slot:
    """A word on the GPU that moves add their sums to, one after another, and its copy in pinned memory.

    It is never zeroed: a move's sum is what it has grown by. That is a launch less. `to_host` are both addresses.
    """

    def __init__(self, word: torch.Tensor, pinned: torch.Tensor) -> None:
        self.word, self.to_host, self.value = word, (pinned.data_ptr(), word.data_ptr()), 0
        self.done: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._found = pinned.numpy()
        self._move: DeviceMove | None = None

    def begin(self) -> DeviceMove:
        if self._move is not None:
            self._move.wait()
        self._move = DeviceMove(self)
        return self._move

    def growth(self) -> int:
        """What the move that is done has added."""
        before, self.value = self.value, int(self._found[0])
        return signed(self.value - before)


class DeviceMove:
    """A copy that is done when `done` has passed: then the second of `fills`, if any, holds what goes to the first."""

    def __init__(self, slot: _Slot) -> None:
        self._slot, self.done = slot, slot.done
        self.fills: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sum: int | None = None

    def total(self) -> int | None:
        if self._sum is None and not self.done.query():  # type: ignore[no-untyped-call]
            return None
        return self.wait()

    def wait(self) -> int:
        """The sum. Its slot may serve another move from then on."""
        if self._sum is None:
            self.done.synchronize()
            self._sum = self._slot.growth()
            if self.fills is not None:
                payload, staged = self.fills
                # Not by torch, which refuses where a model was running when the payload was made.
                payload.numpy()[:] = staged.numpy()
                self.fills = None
        return self._sum

    def settle(self) -> None:
        torch.cuda.current_stream().wait_event(self.done)


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes `device` the current one, at no price where it is: in all processes but those of several ranks."""
    if torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _fill_pinned_pool() -> None:
    """For payloads on the host, so that none waits for memory: the driver gives that when the device has paused."""
    sizes = [HOST_FRAMES.most >> halvings for halvings in range(12) for _ in range(HOST_PAYLOADS)]  # as torch keeps it
    _ = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]


def _stream(device: torch.device) -> torch.cuda.Stream:
    """Of high priority: else its small kernels may wait until the engine has nothing more to launch, a chunk long."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
