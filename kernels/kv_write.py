"""Writes new keys and values, or latents, into a layer's pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl


def write_kv(cache_layer: torch.Tensor, planes: Sequence[torch.Tensor], slot_mapping: torch.Tensor) -> None:
    """Write `planes`, each [tokens, heads, dim], into `cache_layer` [planes, pages, heads, page_size, dim], in place.

    `slot_mapping` [tokens] int64 is page * page_size + offset; a token whose slot is -1 is skipped. Live slots must
    be distinct.
    """
    if cache_layer.is_cuda:
        triton_write_kv(cache_layer, planes, slot_mapping)
        return
    page_size = cache_layer.shape[3]
    live = slot_mapping >= 0
    if not bool(live.all()):
        planes, slot_mapping = [values[live] for values in planes], slot_mapping[live]
    pages, offsets = slot_mapping // page_size, slot_mapping % page_size
    for target, values in zip(cache_layer.transpose(2, 3), planes, strict=True):
        target[pages, offsets] = values


def triton_write_kv(cache_layer: torch.Tensor, planes: Sequence[torch.Tensor], slot_mapping: torch.Tensor) -> None:
    """The same as one kernel; the planes' heads may be part of wider rows, alike in all planes."""
    first, last = planes[0], planes[-1]
    tokens, heads, dim = first.shape
    if tokens:
        _write_kv[(tokens, len(planes))](
            cache_layer,
            first,
            last,
            slot_mapping,
            cache_layer.stride(0),
            first.stride(0),
            last.stride(0),
            first.stride(1),
            heads,
            page_size=cache_layer.shape[3],
            dim=dim,
            block_heads=triton.next_power_of_2(heads),
            block=triton.next_power_of_2(dim),
        )


@triton.jit  # type: ignore[untyped-decorator]
def _write_kv(
    cache_layer: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    slot_mapping: tl.tensor,
    plane_stride: tl.tensor,
    first_stride: tl.tensor,
    last_stride: tl.tensor,
    head_stride: tl.tensor,
    heads: tl.tensor,
    page_size: tl.constexpr,
    dim: tl.constexpr,
    block_heads: tl.constexpr,
    block: tl.constexpr,
) -> None:
    token, plane = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    head, columns = tl.arange(0, block_heads)[:, None], tl.arange(0, block)[None, :]
    within = (head < heads) & (columns < dim)
    source = first + token * first_stride if plane == 0 else last + token * last_stride
    values = tl.load(source + head * head_stride + columns, mask=within)
    row = (slot // page_size * heads + head) * page_size + slot % page_size
    tl.store(cache_layer + plane * plane_stride + row * dim + columns, values, mask=within)
