"""Host memory for the KV of preempted sequences: parked and restored, not computed again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from splitserve.engine.kv_cache import KvCache


class HostTier:
    """Copies of whole pages of one rank, by key, never more than `budget_bytes` in all."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._parked: dict[Hashable, list[torch.Tensor]] = {}
        self.used_bytes = 0

    def park(self, key: Hashable, cache: KvCache, pages: Sequence[int]) -> bool:
        """Copy `pages` out of `cache`; False when they do not fit into the budget (nothing changes then)."""
        if key in self._parked:
            raise ValueError(f"{key!r} is parked already")
        size = len(pages) * cache.layout.bytes_per_page
        if self.used_bytes + size > self._budget_bytes:
            return False
        index = torch.tensor(pages, dtype=torch.int64, device=cache.layers[0].device)
        self._parked[key] = [layer.index_select(1, index).cpu() for layer in cache.layers]
        self.used_bytes += size
        return True

    def restore(self, key: Hashable, cache: KvCache, pages: Sequence[int]) -> None:
        """Copy what was parked into `pages`, in the same order, and forget it. Raises KeyError when nothing was."""
        parked = self._parked[key]
        if parked[0].shape[1] != len(pages):
            raise ValueError(f"pages: found {len(pages)}; {key!r} was parked with {parked[0].shape[1]}")
        index = torch.tensor(pages, dtype=torch.int64, device=cache.layers[0].device)
        for layer, copy in zip(cache.layers, parked, strict=True):
            layer.index_copy_(1, index, copy.to(layer.device))
        self.drop(key)

    def drop(self, key: Hashable) -> None:
        """Forget what was parked under `key`. Raises KeyError when nothing was."""
        self.used_bytes -= sum(tensor.nbytes for tensor in self._parked.pop(key))
