"""Copies between a GPU's pages and payloads, by kernels on a stream of its own: the engine's own work goes on.

What a frame costs here is host time, a dozen microseconds for every call of torch's, so few are made.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
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
# Smaller payloads for another GPU are packed straight across: its copy engines are faster than SMs, but start later.
LEAST_BOUNCED_BYTES = 1 << 20
SLOTS = 1024
HOST_PAYLOADS = 8  # at once, that travel with their messages
WORD_BYTES, WORD_STRIDE = 8, 2  # every 16 bytes, so that one compiled kernel does for every word


class DeviceMover:
    """Copies of one cache follow one another. A payload may lie on this GPU, on another that is mapped, or on the host.

    Where that is not pinned, `pack` fills the payload when it is asked for the sum.
    """

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache
        self._device = cache.layers[0].device
        self._layers = PagedLayers.of(cache.layers)
        self._stream, self._copies = _stream(self._device), _stream(self._device)
        self._bounces = _Bounces(self._device)
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
            small = payload.numel() < LEAST_BOUNCED_BYTES
            if payload.is_cuda and (small or payload.device == self._device):
                return self._run(pack_kv, PACK_SMS, table, region, payload)
            reached = payload if payload.is_cuda or payload.is_pinned() else torch.empty_like(payload, pin_memory=True)
            bounce = self._bounces.take(payload.numel(), self._stream)
            move = self._run(pack_kv, PACK_SMS, table, region, bounce.bytes)
            self._copies.wait_event(move.done)
            copy_async(reached.data_ptr(), bounce.bytes.data_ptr(), payload.numel(), self._copies)
            move.done.record(self._copies)
            bounce.free = move.done
            if reached is not payload:
                move.fills = (payload, reached)
            return move

    def unpack(self, table: torch.Tensor, region: KvRegion, payload: torch.Tensor, after: Mark) -> DeviceMove:
        with _current(self._device):
            if after is not None:
                self._stream.wait_event(after)
            if payload.is_cuda:
                return self._run(unpack_kv, UNPACK_SMS, table, region, payload)
            source = payload.pin_memory()
            bounce = self._bounces.take(payload.numel(), self._copies)
            copy_async(bounce.bytes.data_ptr(), source.data_ptr(), payload.numel(), self._copies)
            self._stream.wait_stream(self._copies)
            move = self._run(unpack_kv, UNPACK_SMS, table, region, bounce.bytes)
            bounce.free, move.source = move.done, source
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


@dataclass
class _Bounce:
    """Memory for one payload, which others may take when `free` has passed."""

    bytes: torch.Tensor
    start: int
    end: int
    free: torch.cuda.Event | None = None

    @property
    def is_free(self) -> bool:
        return self.free is None or bool(self.free.query())  # type: ignore[no-untyped-call]


class _Bounces:
    """Memory of `device` that payloads pass through, one behind another, and round again.

    Copy engines bring them to other GPUs, and to and from the host, faster than SMs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bytes: torch.Tensor | None = None
        self._taken: deque[_Bounce] = deque()

    def take(self, size: int, stream: torch.cuda.Stream) -> _Bounce:
        """At most BOUNCE_BYTES, for what `stream` does from here on."""
        if self._bytes is None:
            self._bytes = torch.empty(BOUNCE_BYTES, dtype=torch.uint8, device=self._device)
        while self._taken and self._taken[0].is_free:
            self._taken.popleft()
        start = -(-self._taken[-1].end // WORD_BYTES) * WORD_BYTES if self._taken else 0
        start = start if start + size <= BOUNCE_BYTES else 0
        bounce = _Bounce(self._bytes.narrow(0, start, size), start, start + size)
        while any(start < other.end and other.start < bounce.end for other in self._taken):
            if (free := self._taken.popleft().free) is not None:
                stream.wait_event(free)
        self._taken.append(bounce)
        return bounce


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
    """A copy that is done when `done` has passed: then the second of `fills`, if any, holds what goes to the first.

    `source` is pinned memory that it reads, and nobody else may have until then.
    """

    def __init__(self, slot: _Slot) -> None:
        self._slot, self.done = slot, slot.done
        self.fills: tuple[torch.Tensor, torch.Tensor] | None = None
        self.source: torch.Tensor | None = None
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
            self.source = None
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
