"""What decode attention does with one tile of keys: scores, online softmax, and the fold of results.

Rows of queries stand beside keys either way, [rows, keys] or with KEYS_FIRST [keys, rows]. Columns come in parts,
tuples of tiles, so that no product is one long chain.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _dot(a, b, acc, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def beside(x, KEYS_FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """One number a row [rows], to stand beside a tile [rows, n] or [n, rows]."""
    return x[None, :] if KEYS_FIRST else x[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def fold(top, total, acc, other_top, other_total, other_acc, KEYS_FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add a later split's result. Rounded as written: both kernels must come to the same bits."""
    new_top = tl.maximum(top, other_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    keep, add = tl.exp2(top - base), tl.exp2(other_top - base)
    total = tl.fma(other_total, add, total * keep)
    folded: tl.tuple = ()
    for part in tl.static_range(len(acc)):
        wide_add = tl.broadcast_to(beside(add, KEYS_FIRST), acc[part].shape)
        folded += (tl.fma(other_acc[part], wide_add, acc[part] * beside(keep, KEYS_FIRST)),)
    return new_top, total, folded


@triton.jit  # type: ignore[untyped-decorator]
def normalised(total, acc, KEYS_FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    return acc / beside(tl.where(total == 0.0, 1.0, total), KEYS_FIRST)


@triton.jit  # type: ignore[untyped-decorator]
def _scores(q, keys, KEYS_FIRST: tl.constexpr, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    first, second = (keys, q) if KEYS_FIRST else (q, keys)
    return _dot(first, tl.trans(second), None, UPCAST)


@triton.jit  # type: ignore[untyped-decorator]
def attend_tile(  # type: ignore[no-untyped-def]
    q, keys, values, visible, scale, top, total, acc, KEYS_FIRST: tl.constexpr, UPCAST: tl.constexpr
):
    """Online softmax over one tile of keys. A sum for each part of the columns: one alone would be a long chain."""
    KEY_AXIS: tl.constexpr = 0 if KEYS_FIRST else 1
    scores = _scores(q[0], keys[0], KEYS_FIRST, UPCAST)
    for part in tl.static_range(1, len(q)):
        more = _scores(q[part], keys[part], KEYS_FIRST, UPCAST)
        scores = tl.fma(scores, tl.full(scores.shape, 1.0, tl.float32), more)  # a plain sum would join the chains again
    scores = tl.where(visible, scores * scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, KEY_AXIS))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - beside(base, KEYS_FIRST))
    keep = tl.exp2(top - base)
    total = tl.fma(total, keep, tl.sum(weights, KEY_AXIS))
    weights = weights.to(values[0].dtype)
    summed: tl.tuple = ()
    for part in tl.static_range(len(acc)):
        kept = acc[part] * beside(keep, KEYS_FIRST)
        if KEYS_FIRST:
            summed += (_dot(tl.trans(values[part]), weights, kept, UPCAST),)
        else:
            summed += (_dot(weights, values[part], kept, UPCAST),)
    return new_top, total, summed


@triton.jit  # type: ignore[untyped-decorator]
def no_sum(ROWS: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr, KEYS_FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Maximum, sum and weighted values of no key at all."""
    acc: tl.tuple = ()
    for _ in tl.static_range(PARTS):
        acc += (tl.zeros([DIM // PARTS, ROWS] if KEYS_FIRST else [ROWS, DIM // PARTS], tl.float32),)
    return tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32), acc


@triton.jit  # type: ignore[untyped-decorator]
def store_rows(base, row, valid, acc, ROW_DIM: tl.constexpr, PART: tl.constexpr, KEYS_FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store part PART of the rows' columns."""
    if KEYS_FIRST:
        acc = tl.trans(acc)
    column = PART * acc.shape[1] + tl.arange(0, acc.shape[1])
    tl.store(base + row[:, None] * ROW_DIM + column[None, :], acc.to(base.dtype.element_ty), mask=valid[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def load_rows(base, row, mask, ROW_DIM: tl.constexpr, FIRST: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = FIRST + tl.arange(0, DIM)
    return tl.load(base + row[:, None] * ROW_DIM + columns[None, :], mask=mask[:, None], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def load_parts(base, row, mask, ROW_DIM: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr, REST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first DIM columns of `row`s in PARTS parts, and the REST behind them."""
    loaded: tl.tuple = ()
    for part in tl.static_range(PARTS):
        loaded += (load_rows(base, row, mask, ROW_DIM, part * (DIM // PARTS), DIM // PARTS),)
    if REST:
        loaded += (load_rows(base, row, mask, ROW_DIM, DIM, REST),)
    return loaded
