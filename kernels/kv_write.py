"""Writes new keys and values into a layer's pages."""

from __future__ import annotations

import torch


def write_kv(cache_layer: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write `k` and `v` [tokens, heads, dim] into `cache_layer` [2, pages, heads, page_size, dim], in place.

    `slot_mapping` [tokens] int64 is page * page_size + offset; a token whose slot is -1 is skipped. Live slots must
    be distinct.
    """
    page_size = cache_layer.shape[3]
    live = slot_mapping >= 0
    if not bool(live.all()):
        k, v, slot_mapping = k[live], v[live], slot_mapping[live]
    pages, offsets = slot_mapping // page_size, slot_mapping % page_size
    for plane, values in zip(cache_layer.transpose(2, 3), (k, v), strict=True):
        plane[pages, offsets] = values
