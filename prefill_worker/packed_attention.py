"""How packed prefill chunks meet their contexts: plain attention over rows gathered from pages, for MLA too."""

from __future__ import annotations

import torch

from splitserve.kernels.gather_pages import gather_pages
from splitserve.kernels.prefill_attention import prefill_attention
from splitserve.models.attention import Product
from splitserve.prefill_worker.packed_batch import DeviceBatch

EXPANDED_BYTES = 512 << 20


class PackedSequences:
    """The `Sequences` of a prefill batch. MLA's latents are expanded.

    Besides queries and results a layer needs room for a copy of all contexts: for MLA the latents, and keys and values
    of as many heads at a time as EXPANDED_BYTES hold (one at least).
    """

    def __init__(self, batch: DeviceBatch) -> None:
        self._batch = batch

    def attend(
        self, q: torch.Tensor, cache_layer: torch.Tensor, scale: float, value_dim: int | None = None
    ) -> torch.Tensor:
        """Attend from `q` [tokens, heads, dim] over keys and values of `cache_layer`."""
        keys, values = gather_pages(cache_layer, self._batch.pages)
        return prefill_attention(q, keys, values, self._batch.tiles, scale)

    def attend_expanded(
        self, q: torch.Tensor, cache_layer: torch.Tensor, up: torch.Tensor, product: Product, scale: float
    ) -> torch.Tensor:
        latents = gather_pages(cache_layer, self._batch.pages)[0, :, 0]
        rank = up.shape[2]
        plain = q.shape[2] - (latents.shape[1] - rank)
        value_dim = up.shape[1] - plain
        out = q.new_empty(*q.shape[:2], value_dim)
        at_once = max(1, EXPANDED_BYTES // (len(latents) * up.shape[1] * up.itemsize))
        for first in range(0, q.shape[1], at_once):
            q_part, up_part, out_part = (
                each.narrow(dim, first, min(at_once, q.shape[1] - first)) for each, dim in ((q, 1), (up, 0), (out, 1))
            )
            expanded = product(latents[:, :rank], up_part.flatten(0, 1)).view(len(latents), *up_part.shape[:2])
            keys, values = torch.split(expanded, [plain, value_dim], dim=-1)
            prefill_attention(q_part, keys, values, self._batch.tiles, scale, rope_keys=latents[:, rank:], out=out_part)
        return out

    def live_rows(self, rows: int) -> torch.Tensor:
        return self._batch.live
