"""Copies between a GPU's pages and payloads, by kernels on a stream of its own: the engine's own work goes on.

What a frame costs here is host time, a dozen microseconds for every call of torch's, so few are made: small copies
that are asked for together end together.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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

# Of the GPU's, which a copy takes. Prefill's kernels fill all of them, and wait for those that pack: it is soon over.
# Decode's leave some free.
PACK_SMS, UNPACK_SMS = 64, 16
# What ends together at most, but for a payload that is larger: a part of what fits into memory that payloads pass.
BATCH_COPIES, BATCH_BYTES = 16, BOUNCE_BYTES // 8
# Smaller payloads for another GPU are packed straight across: its copy engines are faster than SMs, but start later.
LEAST_BOUNCED_BYTES = 1 << 20
ROWS = 256
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
        words = torch.zeros(ROWS, BATCH_COPIES, WORD_STRIDE, dtype=torch.int64, device=self._device)
        sums = torch.zeros(ROWS, BATCH_COPIES, WORD_STRIDE, dtype=torch.int64, pin_memory=True)
        self._rows = itertools.cycle([_Row(*each) for each in zip(words, sums, strict=True)])
        self._batch: _Batch | None = None
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
        size = payload.numel()
        with _current(self._device):
            batch = self._batch_for(size)
            if payload.is_cuda and (size < LEAST_BOUNCED_BYTES or payload.device == self._device):
                return self._run(pack_kv, PACK_SMS, batch, table, region, payload)
            reached = payload if payload.is_cuda or payload.is_pinned() else torch.empty_like(payload, pin_memory=True)
            packed = self._bounce(batch, size, self._stream)
            batch.leaving.append((reached.data_ptr(), packed.data_ptr(), size))
            move = self._run(pack_kv, PACK_SMS, batch, table, region, packed)
            move.fills = None if reached is payload else (payload, reached)
            return move

    def unpack(self, table: torch.Tensor, region: KvRegion, payload: torch.Tensor, after: Mark) -> DeviceMove:
        with _current(self._device):
            batch = self._batch_for(payload.numel())
            if after is not None:
                self._stream.wait_event(after)
            if payload.is_cuda:
                return self._run(unpack_kv, UNPACK_SMS, batch, table, region, payload)
            source = payload.pin_memory()
            packed = self._bounce(batch, payload.numel(), self._copies)
            copy_async(packed.data_ptr(), source.data_ptr(), payload.numel(), self._copies)
            self._stream.wait_stream(self._copies)
            move = self._run(unpack_kv, UNPACK_SMS, batch, table, region, packed)
            move.source = source
            return move

    def launch(self) -> None:
        batch, self._batch = self._batch, None
        if batch is not None:
            with _current(self._device):
                batch.launch(self._stream, self._copies)

    def _batch_for(self, size: int) -> _Batch:
        """What a copy of `size` bytes ends with."""
        if self._batch is not None and self._batch.bytes + size > BATCH_BYTES:
            self.launch()
        if self._batch is None:
            self._batch = next(self._rows).begin()
        return self._batch

    def _bounce(self, batch: _Batch, size: int, stream: torch.cuda.Stream) -> torch.Tensor:
        bounce = self._bounces.take(size, stream)
        batch.bounces.append(bounce)
        return bounce.bytes

    def _run(
        self,
        kernel: Callable[..., None],
        sms: int,
        batch: _Batch,
        table: torch.Tensor,
        region: KvRegion,
        packed: torch.Tensor,
    ) -> DeviceMove:
        move = batch.add(packed.numel())
        kernel(self._layers, table, region, packed, move.word, sms, self._stream)
        if batch.is_full:
            self.launch()
        return move


@dataclass
class _Bounce:
    """Memory for one payload, which others may take when `free` has passed; None until its batch is launched."""

    bytes: torch.Tensor
    start: int
    end: int
    free: torch.cuda.Event | None = None

    @property
    def is_free(self) -> bool:
        return self.free is not None and bool(self.free.query())  # type: ignore[no-untyped-call]


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


class _Row:
    """What batches take by turns: a word on the GPU for the sum of each copy, their copy in pinned memory, an event.

    Words are never zeroed: a copy's sum is what its word has grown by. That is a launch less.
    """

    def __init__(self, words: torch.Tensor, sums: torch.Tensor) -> None:
        self.words = [word[:1] for word in words]
        self.to_host = sums.data_ptr(), words.data_ptr()
        self.done: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._found, self._before = sums.numpy()[:, 0], [0] * BATCH_COPIES
        self._batch: _Batch | None = None

    def begin(self) -> _Batch:
        if self._batch is not None:
            for move in self._batch.moves:
                move.wait()
        self._batch = _Batch(self)
        return self._batch

    def growth(self, index: int) -> int:
        """What the copy of that index has added, once its batch is done."""
        before, self._before[index] = self._before[index], int(self._found[index])
        return signed(self._before[index] - before)


@dataclass
class _Batch:
    """Copies that end together. Payloads that are `leaving` then go on from where they are packed, in `bounces`.

    Of those, addresses of target and source, and bytes.
    """

    row: _Row
    moves: list[DeviceMove] = field(default_factory=list)
    bounces: list[_Bounce] = field(default_factory=list)
    leaving: list[tuple[int, int, int]] = field(default_factory=list)
    bytes: int = 0
    launched: bool = False

    @property
    def is_full(self) -> bool:
        return len(self.moves) == BATCH_COPIES or self.bytes >= BATCH_BYTES

    @property
    def is_done(self) -> bool:
        return self.launched and bool(self.row.done.query())  # type: ignore[no-untyped-call]

    def add(self, size: int) -> DeviceMove:
        move = DeviceMove(self, len(self.moves))
        self.moves.append(move)
        self.bytes += size
        return move

    def launch(self, stream: torch.cuda.Stream, copies: torch.cuda.Stream) -> None:
        """Let what is `leaving` go on by `copies` behind `stream`, and `done` tell of all."""
        done = self.row.done
        copy_async(*self.row.to_host, WORD_BYTES * WORD_STRIDE * len(self.moves), stream)
        done.record(stream)
        if self.leaving:
            copies.wait_event(done)
            for copy in self.leaving:
                copy_async(*copy, copies)
            done.record(copies)
        for bounce in self.bounces:
            bounce.free = done
        self.launched = True


class DeviceMove:
    """A copy that is done when its batch is: then the second of `fills`, if any, holds what goes to the first.

    Its sum is what its `word` grows by. `source` is pinned memory that it reads, and nobody else may have until then.
    """

    def __init__(self, batch: _Batch, index: int) -> None:
        self._batch, self._index, self.word = batch, index, batch.row.words[index]
        self.fills: tuple[torch.Tensor, torch.Tensor] | None = None
        self.source: torch.Tensor | None = None
        self._sum: int | None = None

    def total(self) -> int | None:
        if self._sum is None and not self._batch.is_done:
            return None
        return self.wait()

    def wait(self) -> int:
        """The sum, of a copy that is launched. Its word may serve another one from then on."""
        if self._sum is None:
            self._batch.row.done.synchronize()
            self._sum = self._batch.row.growth(self._index)
            if self.fills is not None:
                payload, staged = self.fills
                # Not by torch, which refuses where a model was running when the payload was made.
                payload.numpy()[:] = staged.numpy()
                self.fills = None
            self.source = None
        return self._sum

    def settle(self) -> None:
        torch.cuda.current_stream().wait_event(self._batch.row.done)


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
