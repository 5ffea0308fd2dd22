"""Copies between a cache's pages and payloads: at once where the pages are in host memory, under way on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from splitserve.engine.kv_cache import KvCache
from splitserve.engine.to_device import to_device
from splitserve.kernels.kv_pack import KvRegion
from splitserve.kv_transfer.checksum import weighted_sum
from splitserve.kv_transfer.packing import cache_rows, check_pages, pack, unpack

Mark = torch.cuda.Event | None


class Move(Protocol):
    """One copy. What it read and wrote must stay until `total` is known, or `settle` has been called."""

    def total(self) -> int | None:
        """The payload's weighted sum, once all of it is copied; None until then."""

    def settle(self) -> None:
        """Whatever the engine does to the pages from here on comes after this copy, which has been launched."""


class Mover(Protocol):
    """A `payload` is uint8 of its region's size."""

    cache: KvCache

    def mark(self) -> Mark:
        """What the engine has launched up to now."""

    def passed(self, mark: Mark) -> bool:
        """Whether the device has come past `mark`. A copy behind one that it has not would hold up those behind it."""

    def table(self, pages: Sequence[int], stop_token: int) -> torch.Tensor:
        """Page numbers [pages] int64 on the cache's device; token t lies in pages[t // page_size].

        Raises TransferFailed when they do not reach `stop_token`, repeat, or lie outside the cache.
        """

    def pack(self, table: torch.Tensor, region: KvRegion, payload: torch.Tensor) -> Move:
        """Copy `region` of a table's pages, written before a mark that has passed, into `payload`."""

    def unpack(self, table: torch.Tensor, region: KvRegion, payload: torch.Tensor, after: Mark) -> Move:
        """Copy `payload` into `region`, behind the mark `after`. The sum is that of the words as they were written."""

    def launch(self) -> None:
        """See to it that what `pack` and `unpack` were asked for is done: small copies end together."""


@dataclass(frozen=True)
class Moved:
    """A copy that is done."""

    sum: int

    def total(self) -> int:
        return self.sum

    def settle(self) -> None:
        """Nothing is under way."""


class HostMover:
    """Copies at once, by torch, between pages anywhere and payloads in host memory."""

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache
        self._packed = np.empty(0, dtype=np.uint8)

    def mark(self) -> None:
        """Copies follow what the engine has launched by themselves."""

    def passed(self, mark: Mark) -> bool:
        return True

    def table(self, pages: Sequence[int], stop_token: int) -> torch.Tensor:
        check_pages(self.cache, pages, stop_token)
        return to_device(pages, self.cache.layers[0].device)

    def pack(self, table: torch.Tensor, region: KvRegion, payload: torch.Tensor) -> Moved:
        # In shared memory a sender that was given up for dead may still write: its words, summed there, would pass for
        # this one's.
        if payload.numel() > self._packed.size:
            self._packed = np.empty(payload.numel(), dtype=np.uint8)
        words = self._packed[: payload.numel()]
        packed = torch.from_numpy(words)
        pack(self.cache, cache_rows(self.cache, table, region.heads, region.tokens), region.layers, packed)
        total = weighted_sum(packed)
        payload.numpy()[:] = words  # not by torch, which refuses where a model was running when the payload was made
        return Moved(total)

    def unpack(self, table: torch.Tensor, region: KvRegion, payload: torch.Tensor, after: Mark) -> Moved:
        total = weighted_sum(payload)  # first: it leaves the payload in the processor's cache
        unpack(self.cache, cache_rows(self.cache, table, region.heads, region.tokens), region.layers, payload)
        return Moved(total)

    def launch(self) -> None:
        """All is done."""
