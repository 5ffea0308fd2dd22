"""Gather KV pages into one packed buffer, and scatter it back.

A buffer holds [layers, planes, heads, tokens, head_dim] of one piece, contiguous, with no trace of pages. Elements
move as 8-byte words whatever their dtype, which index copies like best.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from splitserve.cluster.errors import TransferFailed
from splitserve.cluster.layout import DTYPE_BYTES, KvLayout
from splitserve.engine.kv_cache import KvCache

WORD_BYTES = 8


def bytes_per_layer_token(layout: KvLayout, heads: tuple[int, int]) -> int:
    """Packed bytes of one token of `heads` of one layer. Raises TransferFailed unless a head fills whole words."""
    size = layout.head_dim * DTYPE_BYTES[layout.dtype]
    if size % WORD_BYTES:
        raise TransferFailed(
            f"KvLayout.head_dim: found {layout.head_dim} of {layout.dtype}; "
            f"a head must fill whole words of {WORD_BYTES} bytes"
        )
    return layout.planes * (heads[1] - heads[0]) * size


def check_pages(cache: KvCache, pages: Sequence[int], stop_token: int) -> None:
    """Raise TransferFailed when `pages` do not reach `stop_token`, repeat, or lie outside the cache."""
    needed = -(-stop_token // cache.layout.page_size)
    if len(pages) < needed:
        raise TransferFailed(f"pages: found {len(pages)}; {stop_token} tokens need {needed}")
    if len(set(pages)) != len(pages) or not all(0 <= page < cache.num_pages for page in pages):
        raise TransferFailed(f"pages: they repeat or lie outside the cache of {cache.num_pages} pages")


def cache_rows(cache: KvCache, table: torch.Tensor, heads: tuple[int, int], tokens: tuple[int, int]) -> torch.Tensor:
    """Rows of a layer seen as [planes * num_pages * heads * page_size, head_dim], in packed order.

    int64 [planes * heads * tokens], on the cache's device. `heads` are local to the rank.
    """
    layout, device = cache.layout, table.device
    token = torch.arange(*tokens, device=device)
    page, slot = table[token // layout.page_size], token % layout.page_size
    plane = torch.arange(layout.planes, device=device).view(-1, 1, 1)
    head = torch.arange(*heads, device=device).view(-1, 1)
    rows = ((plane * cache.num_pages + page) * layout.heads_per_rank + head) * layout.page_size + slot
    return rows.flatten()


def pack(cache: KvCache, rows: torch.Tensor, layers: tuple[int, int], out: torch.Tensor) -> None:
    """Gather `rows` of `layers` into `out`, a contiguous uint8 tensor of exactly that size, on any device."""
    words = _words(out, layers, rows)
    packed = words if out.device == rows.device else torch.empty_like(words, device=rows.device)
    for position, layer in enumerate(range(*layers)):
        torch.index_select(_layer_words(cache, layer), 0, rows, out=packed[position])
    if packed is not words:
        words.copy_(packed)


def unpack(cache: KvCache, rows: torch.Tensor, layers: tuple[int, int], payload: torch.Tensor) -> None:
    """Scatter `payload`, uint8 on any device, as `pack` wrote it, into `rows` of `layers`."""
    words = _words(payload, layers, rows).to(rows.device)
    for position, layer in enumerate(range(*layers)):
        _layer_words(cache, layer).index_copy_(0, rows, words[position])


def _words(buffer: torch.Tensor, layers: tuple[int, int], rows: torch.Tensor) -> torch.Tensor:
    return buffer.view(torch.int64).view(layers[1] - layers[0], rows.numel(), -1)


def _layer_words(cache: KvCache, layer: int) -> torch.Tensor:
    return cache.layers[layer].view(-1, cache.layout.head_dim).view(torch.int64)
