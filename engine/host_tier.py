"""Pages of one rank in host memory: those of parked sequences, and cached prefixes that had to leave their pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from splitserve.engine.host_pages import Pairs
from splitserve.engine.kv_cache import KvCache
from splitserve.engine.to_device import to_device

CHUNK_BYTES = 32 << 20


class HostTier:
    """Numbered places that hold a page each, pinned where `cache` is on a GPU. Memory is taken when a place is used.

    On a GPU a save costs the engine a copy within the GPU and a load the wait for its bytes; the way between host and
    GPU is a stream's of its own. Whatever is launched behind a call finds the pages as if it had been at once.
    """

    def __init__(self, cache: KvCache) -> None:
        first = cache.layers[0]
        self._cache, self._device = cache, first.device
        self._page_shape = (len(cache.layers), first.shape[0], *first.shape[2:])
        self._per_chunk = max(1, CHUNK_BYTES // cache.layout.bytes_per_page)
        self._chunks: dict[int, torch.Tensor] = {}
        self._stream = torch.cuda.Stream(self._device) if first.is_cuda else None  # type: ignore[no-untyped-call]

    def move(self, saves: Pairs, loads: Pairs) -> None:
        """Copy each (page, place) of `saves` out, in order, and then each (place, page) of `loads` in."""
        if saves:
            self._save(saves)
        if loads:
            self._load(loads)

    def _save(self, saves: Pairs) -> None:
        pages = to_device([page for page, _ in saves], self._device)
        staged = torch.stack([layer.index_select(1, pages).transpose(0, 1) for layer in self._cache.layers], dim=1)
        with self._aside(staged):
            for page, (_, place) in zip(staged, saves, strict=True):
                self._at(place).copy_(page, non_blocking=True)

    def _load(self, loads: Pairs) -> None:
        size = (len(loads), *self._page_shape)
        staged = torch.empty(size, dtype=self._cache.layers[0].dtype, device=self._device)
        with self._aside(staged):
            for page, (place, _) in zip(staged, loads, strict=True):
                page.copy_(self._at(place), non_blocking=True)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        pages = to_device([page for _, page in loads], self._device)
        for layer, copies in zip(self._cache.layers, staged.unbind(1), strict=True):
            layer.index_copy_(1, pages, copies.transpose(0, 1))

    def _at(self, place: int) -> torch.Tensor:
        """A place [layers, planes, heads, page_size, head_dim]."""
        number, index = divmod(place, self._per_chunk)
        if number not in self._chunks:
            size, dtype = (self._per_chunk, *self._page_shape), self._cache.layers[0].dtype
            self._chunks[number] = torch.empty(size, dtype=dtype, pin_memory=self._stream is not None)
        return self._chunks[number][index]

    @contextmanager
    def _aside(self, staged: torch.Tensor) -> Iterator[None]:
        """Behind what has been launched, and beside what comes."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        staged.record_stream(self._stream)
