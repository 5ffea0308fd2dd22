"""Copies the contexts of a prefill batch out of their pages into rows that lie end to end.

Attention over rows end to end can load whole tiles of keys at once; so can the product that expands MLA's latents.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_ROWS = 16


def gather_pages(cache_layer: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Copy pages of `cache_layer` [planes, pages, kv_heads, page_size, dim] -> [planes, rows, kv_heads, dim].

    `pages` [entries, 2] int64 names a page and how many of its tokens count; the others come out as 0, whatever the
    page holds there. Entry i fills rows i * page_size and after.
    """
    planes, _, heads, page_size, dim = cache_layer.shape
    entries = len(pages)
    rows = cache_layer.new_empty(planes, entries * page_size, heads, dim)
    _gather_pages[(entries, triton.cdiv(page_size * heads, BLOCK_ROWS), planes)](
        cache_layer, pages, rows, cache_layer.stride(0), rows.stride(0),
        HEADS=heads, PAGE=page_size, DIM=dim, BLOCK_ROWS=BLOCK_ROWS, BLOCK_DIM=triton.next_power_of_2(dim),
    )  # fmt: skip
    return rows


def gather_pages_reference(cache_layer: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """The same in torch."""
    copied = cache_layer[:, pages[:, 0]].transpose(2, 3)
    live = torch.arange(copied.shape[2], device=pages.device) < pages[:, 1:]
    return torch.where(live[:, :, None, None], copied, 0).flatten(1, 2)


@triton.jit  # type: ignore[untyped-decorator]
def _gather_pages(  # type: ignore[no-untyped-def]
    cache_layer, pages, rows, cache_plane_stride, rows_plane_stride,
    HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    entry, plane = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    page, live = tl.load(pages + entry * 2), tl.load(pages + entry * 2 + 1)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token, head = row // HEADS, row % HEADS
    column = tl.arange(0, BLOCK_DIM)[None, :]
    within = (row[:, None] < PAGE * HEADS) & (column < DIM)
    source = cache_layer + plane * cache_plane_stride + page * (HEADS * PAGE * DIM)
    values = tl.load(
        source + (head * PAGE + token)[:, None] * DIM + column, mask=within & (token < live)[:, None], other=0.0
    )
    target = rows + plane * rows_plane_stride + entry * (HEADS * PAGE * DIM)
    tl.store(target + row[:, None] * DIM + column, values, mask=within)
