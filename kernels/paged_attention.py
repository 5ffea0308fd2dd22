"""Causal attention of packed, variable-length queries over paged KV: prefill chunks and decode steps alike.

A query's bits depend on its own vector and its own context alone: not on its neighbours, the chunk it came in, the
page size or the padding. Positions are cut into tiles of 64, always at multiples of 64; every product is a GEMM of at
least 4 rows, whose rows do not touch each other (on a CPU with MKL_CBWR=AVX2,STRICT); the maximum over all tiles comes
first, and the tiles' sums are added one by one in the order of positions.

Work is laid out as items, one per (block of queries, tile of keys), without padding to the longest sequence:

    block 0: |tile 0|tile 1|tile 2|     items 0 1 2
    block 1: |tile 0|                   item  3
    block 2: |tile 0|tile 1|            items 4 5
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Ints = npt.NDArray[np.int64]

TILE = 64
MIN_GEMM_ROWS = 4
MIN_GEMM_COLUMNS = 32  # narrower products take other paths in MKL, chosen by their number of rows
MAX_ITEMS = {1: 256, 8: 128, 64: 64}  # by queries a block: bounds the memory of gathered keys and of scores


@dataclass(frozen=True)
class Heads:
    """Shape of one rank's attention: `query` heads in groups of query // kv, and pages of `page_size` tokens."""

    query: int
    kv: int
    page_size: int


@dataclass(frozen=True)
class TilePlan:
    """Which queries meet which keys: blocks of at most 64 queries and their items, block by block.

    A KV head of an item is one GEMM of `gemm_rows` rows: the block's queries, each with its group of heads, and
    padding. `queries` [items * kv heads * gemm_rows] index q seen as [tokens * heads, dim], and `keys` [items * kv
    heads * 64] the cache seen as [pages * kv heads * page_size, dim]. `bias` [items, 1, queries a block, 1, 64]
    float32 is 0 where the query may see the key and -inf elsewhere. `items` count up from 0, `item_block` [items] is
    each item's block and `block_start` [blocks + 1] each block's first item.
    """

    gemm_rows: int
    queries: torch.Tensor
    keys: torch.Tensor
    bias: torch.Tensor
    items: torch.Tensor
    item_block: torch.Tensor
    block_start: torch.Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """All work of a step. `output` [tokens * heads] are the rows of the plans' joined results."""

    tiles: tuple[TilePlan, ...]
    output: torch.Tensor


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """A step's sequences, shared by all layers; all tensors int64.

    `query_lens` [seqs] are the new tokens, `context_lens` [seqs] all tokens in the cache with the new ones, and
    `block_tables` [seqs, max_pages] the sequences' pages, padded with any page.
    """

    query_lens: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    _plans: dict[tuple[int, Heads], AttentionPlan] = field(default_factory=dict, init=False, repr=False)

    def plan(self, num_tokens: int, heads: Heads) -> AttentionPlan:
        """The work for `num_tokens` packed queries, padding included; made once per step."""
        key = (num_tokens, heads)
        if key not in self._plans:
            self._plans[key] = _make_plan(self, num_tokens, heads)
        return self._plans[key]

    def attend(
        self, q: torch.Tensor, cache_layer: torch.Tensor, scale: float, value_dim: int | None = None
    ) -> torch.Tensor:
        """`paged_attention` over these sequences."""
        return paged_attention(q, cache_layer, self, scale, value_dim)

    def live_rows(self, rows: int) -> torch.Tensor:
        """How many of a layer's `rows` count, int32 [1]: all of them."""
        return self.query_lens.new_tensor([rows], dtype=torch.int32)


def paged_attention(
    q: torch.Tensor,
    cache_layer: torch.Tensor,
    metadata: AttentionMetadata,
    scale: float,
    value_dim: int | None = None,
) -> torch.Tensor:
    """Attend from `q` [tokens, heads, dim] over `cache_layer` [planes, pages, kv_heads, page_size, dim].

    Keys are plane 0 and values plane 1; with `value_dim`, values are the first `value_dim` numbers of the keys.

    Queries are packed in the order of `metadata`'s sequences; rows after the last are padding, whose result means
    nothing. Query head h reads KV head h * kv_heads // heads. Returns [tokens, heads, dim or value_dim] in q's dtype;
    computed in float32.
    """
    tokens, heads, dim = q.shape
    plan = metadata.plan(tokens, Heads(heads, cache_layer.shape[2], cache_layer.shape[3]))
    rows = (q.float() * scale).view(-1, dim)
    planes = cache_layer.view(len(cache_layer), -1, dim)
    attended = torch.cat([_attend(rows, planes, tiles, value_dim or dim) for tiles in plan.tiles])
    return attended.index_select(0, plan.output).view(tokens, heads, -1).to(q.dtype)


def _attend(queries: torch.Tensor, planes: torch.Tensor, plan: TilePlan, value_dim: int) -> torch.Tensor:
    """Attention over one plan of `queries` [rows, dim] to `planes` [planes, rows, dim].

    Returns [blocks * kv heads * gemm_rows, value_dim].
    """
    items, dim, rows = len(plan.items), queries.shape[-1], plan.gemm_rows
    item_queries = torch.embedding(queries, plan.queries).view(-1, rows, dim)
    item_keys = _gather(planes[0], plan.keys)
    scores = torch.bmm(item_queries, item_keys.transpose(1, 2))
    scores.view(items, -1, plan.bias.shape[2], rows // plan.bias.shape[2], TILE).add_(plan.bias)

    by_item = scores.view(items, -1, TILE)
    maxima = torch.segment_reduce(by_item.amax(-1), "max", offsets=plan.block_start, axis=0, unsafe=True)
    weights = by_item.sub_(maxima.index_select(0, plan.item_block).unsqueeze(-1)).exp_()
    totals = _sum_in_order(weights.sum(-1), plan)

    item_values = _gather(planes[1], plan.keys) if len(planes) == 2 else item_keys[..., :value_dim]
    if value_dim < MIN_GEMM_COLUMNS:
        item_values = F.pad(item_values, (0, MIN_GEMM_COLUMNS - value_dim))
    mixed = torch.bmm(weights.view(-1, rows, TILE), item_values)
    sums = _sum_in_order(mixed.view(items, -1), plan).view(-1, mixed.shape[-1])
    return sums[:, :value_dim] / totals.view(-1, 1)


def _gather(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows [slots, dim] by `index` -> tiles [items * kv heads, 64, dim], float32."""
    return torch.embedding(rows, index).float().view(-1, TILE, rows.shape[-1])


def _sum_in_order(items: torch.Tensor, plan: TilePlan) -> torch.Tensor:
    """Add up each block's rows of `items` [items, width] one by one -> [blocks, width].

    An embedding bag adds its rows in the order they are listed; torch.sum promises no order.
    """
    return torch.embedding_bag(items, plan.items, plan.block_start, include_last_offset=True)[0]


@dataclass(frozen=True)
class _Blocks:
    """Blocks of queries: `rows` and `positions` [blocks, queries a block], `tables` [blocks, max_pages].

    A block that is not full repeats its last query.
    """

    rows: Ints
    positions: Ints
    tables: Ints

    @property
    def tiles(self) -> Ints:
        """How many tiles of keys each block sees."""
        return self.positions[:, -1] // TILE + 1

    def __getitem__(self, part: slice) -> _Blocks:
        return _Blocks(self.rows[part], self.positions[part], self.tables[part])


def _make_plan(metadata: AttentionMetadata, num_tokens: int, heads: Heads) -> AttentionPlan:
    device = metadata.query_lens.device
    tiles: list[TilePlan] = []
    output, done = np.zeros(num_tokens * heads.query, np.int64), 0
    for blocks in _cut(metadata):
        queries = _query_rows(blocks, heads)
        output[queries.ravel()] = done + np.arange(queries.size)
        done += queries.size
        tiles.append(_make_tiles(blocks, queries, heads, device))
    return AttentionPlan(tuple(tiles), torch.from_numpy(output).to(device))


def _cut(metadata: AttentionMetadata) -> Iterator[_Blocks]:
    """Cut every sequence's queries into blocks of the smallest size that holds them, or of the largest."""
    query_lens: Ints = metadata.query_lens.cpu().numpy()
    first_rows = np.cumsum(query_lens) - query_lens
    first_positions = metadata.context_lens.cpu().numpy() - query_lens
    block_tables: Ints = metadata.block_tables.cpu().numpy()
    sizes = np.array(list(MAX_ITEMS))
    size_of = sizes[np.searchsorted(sizes[:-1], query_lens)]
    for size in np.unique(size_of[query_lens > 0]).tolist():
        blocks = np.where(size_of == size, -(-query_lens // size), 0)
        seq = np.repeat(np.arange(len(blocks)), blocks)
        offsets = _count_up(blocks)[:, None] * size + np.arange(size)
        offsets = np.minimum(offsets, query_lens[seq, None] - 1)
        rows, positions = first_rows[seq, None] + offsets, first_positions[seq, None] + offsets
        yield from _split(_Blocks(rows, positions, block_tables[seq]), MAX_ITEMS[size])


def _split(blocks: _Blocks, max_items: int) -> Iterator[_Blocks]:
    """Runs of at most `max_items` items, or of one block."""
    start = items = 0
    for block, tiles in enumerate(blocks.tiles.tolist()):
        if items and items + tiles > max_items:
            yield blocks[start:block]
            start, items = block, 0
        items += tiles
    if items:
        yield blocks[start:]


def _query_rows(blocks: _Blocks, heads: Heads) -> Ints:
    """Rows of q seen as [tokens * heads, dim] -> [blocks, kv heads, gemm_rows]; padding repeats the last."""
    group = heads.query // heads.kv
    grouped = np.arange(heads.query).reshape(heads.kv, 1, group)
    rows = blocks.rows[:, None, :, None] * heads.query + grouped
    rows = rows.reshape(len(blocks.rows), heads.kv, -1)
    return np.pad(rows, ((0, 0), (0, 0), (0, max(0, MIN_GEMM_ROWS - rows.shape[-1]))), mode="edge")


def _make_tiles(blocks: _Blocks, queries: Ints, heads: Heads, device: torch.device) -> TilePlan:
    item_block = np.repeat(np.arange(len(blocks.rows)), blocks.tiles)
    key_positions = _count_up(blocks.tiles)[:, None] * TILE + np.arange(TILE)
    # What lies beyond the context may be NaN, which not even a weight of 0 would silence: read position 0 instead.
    readable = np.where(key_positions <= blocks.positions[item_block, -1:], key_positions, 0)
    pages = blocks.tables[item_block[:, None], readable // heads.page_size]
    head_rows = pages[:, None] * heads.kv + np.arange(heads.kv)[:, None]
    visible = key_positions[:, None] <= blocks.positions[item_block][:, :, None]

    def tensor(array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return TilePlan(
        gemm_rows=queries.shape[-1],
        queries=tensor(queries[item_block].ravel()),
        keys=tensor((head_rows * heads.page_size + (readable % heads.page_size)[:, None]).ravel()),
        bias=tensor(np.where(visible, np.float32(0), np.float32(-np.inf))[:, None, :, None]),
        items=tensor(np.arange(len(item_block))),
        item_block=tensor(item_block),
        block_start=tensor(np.concatenate(([0], np.cumsum(blocks.tiles)))),
    )


def _count_up(counts: Ints) -> Ints:
    """(2, 3) -> (0, 1, 0, 1, 2)."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
