"""Copies between a GPU's pages and payloads, by kernels on a stream of its own: the engine's own work goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from splitserve.engine.kv_cache import KvCache
from splitserve.kernels.kv_pack import KvRegion, PagedLayers, pack_kv, unpack_kv
from splitserve.kv_transfer.mover import Mark
from splitserve.kv_transfer.packing import check_pages

SMS = 16  # of the GPU's, which one copy takes: the engine computes on the others


class DeviceMover:
    """Copies of one cache follow one another. A payload may lie on this GPU, on another that is mapped, or on the host.

    Payloads on the host go through pinned memory: `pack` fills them when it is asked for the sum.
    """

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache
        self._device = cache.layers[0].device
        self._layers = PagedLayers.of(cache.layers)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def mark(self) -> Mark:
        return _recorded(torch.cuda.current_stream(self._device))

    def table(self, pages: Sequence[int], stop_token: int) -> torch.Tensor:
        check_pages(self.cache, pages, stop_token)
        table = torch.tensor(pages, dtype=torch.int64).pin_memory()
        with torch.cuda.stream(self._stream):
            return table.to(self._device, non_blocking=True)

    def pack(self, table: torch.Tensor, region: KvRegion, payload: torch.Tensor, after: Mark) -> DeviceMove:
        with torch.cuda.stream(self._stream):
            packed = payload if payload.is_cuda else torch.empty_like(payload, device=self._device)
            total = self._run(pack_kv, table, region, packed, after)
            staged = None if payload.is_cuda else _to_pinned(packed)
            return DeviceMove(total, _recorded(self._stream), payload, staged)

    def unpack(self, table: torch.Tensor, region: KvRegion, payload: torch.Tensor, after: Mark) -> DeviceMove:
        with torch.cuda.stream(self._stream):
            packed = payload if payload.is_cuda else payload.pin_memory().to(self._device, non_blocking=True)
            total = self._run(unpack_kv, table, region, packed, after)
            return DeviceMove(total, _recorded(self._stream), packed, None)

    def _run(
        self, kernel: Callable[..., None], table: torch.Tensor, region: KvRegion, packed: torch.Tensor, after: Mark
    ) -> torch.Tensor:
        """The sum, which is on its way to host memory."""
        if after is not None:
            self._stream.wait_event(after)
        total = torch.zeros(1, dtype=torch.int64, device=self._device)
        kernel(self._layers, table, region, packed, total, SMS)
        return _to_pinned(total)


@dataclass
class DeviceMove:
    """`sum` holds, and `payload` or what fills it, `staged`, is whole when `done` has passed."""

    sum: torch.Tensor
    done: torch.cuda.Event
    payload: torch.Tensor
    staged: torch.Tensor | None

    def total(self) -> int | None:
        if not self.done.query():  # type: ignore[no-untyped-call]
            return None
        if self.staged is not None:
            self.payload.copy_(self.staged)
            self.staged = None
        return int(self.sum)

    def settle(self) -> None:
        torch.cuda.current_stream().wait_event(self.done)


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
