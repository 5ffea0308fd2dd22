"""The KV pages of one rank."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from splitserve.cluster.layout import KvLayout
from splitserve.engine.to_device import to_device

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KvCache:
    """One zeroed tensor [planes, num_pages, heads_per_rank, page_size, head_dim] a layer, in `layers`.

    K is plane 0 and V plane 1; MLA has its latent in a single plane. Raises torch.OutOfMemoryError on a GPU (and
    RuntimeError on a CPU) when the memory is not there.
    """

    def __init__(self, layout: KvLayout, num_pages: int, device: torch.device) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages: found {num_pages}; a cache has at least one page")
        self.layout = layout
        self.num_pages = num_pages
        shape = (layout.planes, num_pages, layout.heads_per_rank, layout.page_size, layout.head_dim)
        dtype = TORCH_DTYPES[layout.dtype]
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layout.num_layers)]

    def copy_pages(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole pages, (source, destination) each, in every layer. Destinations must be distinct from sources."""
        if not (pages := list(pairs)):
            return
        sources, destinations = to_device(pages, self.layers[0].device).unbind(1)
        for layer in self.layers:
            layer[:, destinations] = layer[:, sources]


def pages_for_budget(layout: KvLayout, budget_bytes: int) -> int:
    """How many pages of one rank fit into `budget_bytes`."""
    return budget_bytes // layout.bytes_per_page
