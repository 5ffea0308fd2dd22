"""Causal attention of packed prefill chunks over each sequence's whole context, cached prefix and chunk.

Queries are cut into tiles of one sequence each, listed by `query_tiles`; a program takes a tile and a head, and goes
over the keys from position 0 on in tiles of fixed size, in order, with a running softmax (FlashAttention-2, arXiv
2307.08691). Only the tiles at the causal edge are masked, with arithmetic that is otherwise the same, and a masked key
adds exactly 0: so a query's bits depend on its own vector and context alone, not on packing, chunks or neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from splitserve.kernels.launch import INTERPRETING

LOG2_E = 1.4426950408889634
QUERY_TILE = 128
KEY_TILE = 128

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PrefillTiles:
    """How the kernel is compiled: `keys` a tile (a divisor of KEY_TILE; changes bits), warps and pipeline stages."""

    keys: int
    warps: int
    stages: int


def prefill_tiles(dtype: torch.dtype) -> PrefillTiles:
    """Measured on an H100; docs/LOG.md has the runners-up."""
    return PrefillTiles(32, 8, 1) if dtype == torch.float32 else PrefillTiles(64, 8, 3)


def supports_heads(*dims: int) -> bool:
    """Whether heads whose parts have these widths can be attended."""
    return all(dim >= 16 and dim & (dim - 1) == 0 for dim in dims)


def query_tiles(query_lens: npt.ArrayLike, starts: npt.ArrayLike, context_rows: npt.ArrayLike) -> Ints:
    """The work list of sequences with `query_lens` packed queries, the first at position `starts`: [tiles, 4].

    A tile is its first row of q, its number of rows, the row of keys where its sequence's context begins (from
    `context_rows`), and the position of its first query. Those with the longest contexts come first, because work
    that starts last should be short.
    """
    lens = np.asarray(query_lens, np.int64)
    tiles = -(-lens // QUERY_TILE)
    owner = np.repeat(np.arange(len(lens)), tiles)
    offset = (np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * QUERY_TILE
    rows = np.minimum(lens[owner] - offset, QUERY_TILE)
    first_row, position = (np.cumsum(lens) - lens)[owner] + offset, np.asarray(starts, np.int64)[owner] + offset
    order = np.argsort(-(position + rows), kind="stable")
    return np.stack((first_row, rows, np.asarray(context_rows, np.int64)[owner], position), axis=1)[order]


def prefill_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    *,
    rope_keys: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: PrefillTiles | None = None,
) -> torch.Tensor:
    """Attend from `q` [tokens, heads, dim + rest] over `keys` and `values` [rows, kv_heads, dim or value_dim].

    The last `rest` numbers of a query meet `rope_keys` [rows, rest], which all heads share; without them rest is 0.
    Query head h reads KV head h * kv_heads // heads. All may be part of wider rows. A sequence's context lies in rows
    of its own, and the rows up to a multiple of KEY_TILE after it hold finite numbers. `tiles` [tiles, 4] int64 on the
    device are those of `query_tiles`, or 0 for no work. Returns `out` [tokens, heads, value_dim] in q's dtype, computed
    in float32; rows of no tile hold anything. Raises ValueError for tensors that do not fit together and for widths
    that are not powers of two from 16 on.
    """
    tokens, heads, width = q.shape
    (rows, kv_heads, dim), value_dim = keys.shape, values.shape[-1]
    rest = 0 if rope_keys is None else rope_keys.shape[1]
    if width != dim + rest or values.shape[:2] != (rows, kv_heads) or heads % kv_heads:
        raise ValueError(f"q {tuple(q.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit")
    if not supports_heads(dim, value_dim, rest or dim):
        raise ValueError(f"heads of {dim} + {rest} with values of {value_dim}: expected powers of two from 16 on")
    if q.stride(2) != 1 or tiles.dtype != torch.int64 or not tiles.is_contiguous():
        raise ValueError("the heads of q must be contiguous, and tiles int64 and contiguous")
    config = config or prefill_tiles(q.dtype)
    if out is None:
        out = q.new_empty(tokens, heads, value_dim)
    described_keys = _described(keys, config.keys)
    _prefill_kernel[(heads, len(tiles))](
        q, described_keys, _described(values, config.keys),
        described_keys if rope_keys is None else _described(rope_keys[:, None], config.keys), out, tiles,
        scale * LOG2_E, q.stride(0), q.stride(1), keys.stride(1), values.stride(1), out.stride(0), out.stride(1),
        GROUP=heads // kv_heads, DIM=dim, REST=rest, VALUE_DIM=value_dim, BLOCK_M=QUERY_TILE, BLOCK_N=config.keys,
        UPCAST=INTERPRETING and q.dtype != torch.float32, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


def prefill_attention_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    rope_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in float64, tile by tile."""
    heads, group = q.shape[1], q.shape[1] // keys.shape[1]
    out = q.new_zeros(len(q), heads, values.shape[-1], dtype=torch.float64)
    if rope_keys is not None:
        keys = torch.cat((keys, rope_keys[:, None].expand(-1, keys.shape[1], -1)), dim=-1)
    for first, rows, context, position in tiles.tolist():
        own = slice(context, context + position + rows)
        k, v = (each[own].double().repeat_interleave(group, 1) for each in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[first : first + rows].double() * scale, k)
        seen = torch.arange(position, position + rows, device=q.device)[:, None]
        late = torch.arange(len(k), device=q.device) > seen
        weights = scores.masked_fill(late, -torch.inf).softmax(-1)
        out[first : first + rows] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


def _described(heads: torch.Tensor, block: int) -> TensorDescriptor:
    """For loads of [block, dim] tiles of one head of `heads` [rows, heads, dim], seen as a matrix."""
    rows, count, dim = heads.shape
    columns = (count - 1) * heads.stride(1) + dim
    return TensorDescriptor(heads, [rows, columns], [heads.stride(0), 1], [block, dim])


@triton.jit  # type: ignore[untyped-decorator]
def _dot(a, b, acc, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit  # type: ignore[untyped-decorator]
def _fold_tile(  # type: ignore[no-untyped-def]
    q, q_rest, keys, rope_keys, values, row, key_column, value_column, start, seen, scale, top, total, acc,
    REST: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tile of keys at position `start`. Rounded alike with and without a mask."""
    scores = _dot(q, tl.trans(keys.load([row, key_column])), None, UPCAST)
    if REST:
        scores = _dot(q_rest, tl.trans(rope_keys.load([row, 0])), scores, UPCAST)
    if MASKED:
        scores = tl.where(start + tl.arange(0, BLOCK_N)[None, :] <= seen[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    keep = tl.exp2(top - new_top)
    weights = tl.exp2(tl.fma(scores, scale, -new_top[:, None]))
    total = tl.fma(total, keep, tl.sum(weights, 1))
    tile = values.load([row, value_column])
    acc = _dot(weights.to(tile.dtype), tile, acc * keep[:, None], UPCAST)
    return new_top, total, acc


@triton.jit  # type: ignore[untyped-decorator]
def _prefill_kernel(  # type: ignore[no-untyped-def]
    q, keys, values, rope_keys, out, tiles, scale,
    q_stride, q_head_stride, key_head_stride, value_head_stride, out_stride, out_head_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), tiles + tl.program_id(1) * 4
    first_row, rows = tl.load(tile), tl.load(tile + 1).to(tl.int32)
    context, position = tl.load(tile + 2).to(tl.int32), tl.load(tile + 3).to(tl.int32)
    row = tl.arange(0, BLOCK_M)
    live = (row < rows)[:, None]
    q_row = q + (first_row + row)[:, None] * q_stride + head * q_head_stride
    q_main = tl.load(q_row + tl.arange(0, DIM)[None, :], mask=live, other=0.0)
    q_rest = q_main
    if REST:
        q_rest = tl.load(q_row + DIM + tl.arange(0, REST)[None, :], mask=live, other=0.0)
    key_column, value_column = head // GROUP * key_head_stride, head // GROUP * value_head_stride

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_DIM], tl.float32)
    seen = position + row
    stop = position + rows  # 0 for no work
    whole = tl.minimum(position + 1, stop) // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        top, total, acc = _fold_tile(
            q_main, q_rest, keys, rope_keys, values, context + start, key_column, value_column,
            start, seen, scale, top, total, acc, REST, BLOCK_N, False, UPCAST,
        )  # fmt: skip
    for start in range(whole, stop, BLOCK_N):
        top, total, acc = _fold_tile(
            q_main, q_rest, keys, rope_keys, values, context + start, key_column, value_column,
            start, seen, scale, top, total, acc, REST, BLOCK_N, True, UPCAST,
        )  # fmt: skip
    target = out + (first_row + row)[:, None] * out_stride + head * out_head_stride + tl.arange(0, VALUE_DIM)[None, :]
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=live)
