"""Decode attention over pages: grouped-query attention and absorbed MLA, for batches whose lengths the device knows.

FlashDecoding's split-KV: every program computes one piece of the plan (`decode_plan`), and of a slot's pieces the last
to end, or a kernel behind, folds what all have left, in the order of positions, with the operations that a single piece
would have used. So a slot's bits depend on its own queries and context alone: not on its neighbours, its place, the
number of programs, or the page size.

Rows are the (query, head) pairs that share a KV head, in blocks padded for the tensor cores. Scores are [rows, keys],
or with `keys_first` [keys, rows]: 64 keys fill Hopper's wgmma, which 16 rows do not.
Columns come in `parts`, each a chain of products of its own: one chain over 576 columns is long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from splitserve.kernels.decode_plan import (
    DecodePlan,
    DecodeScratch,
    DecodeShape,
    DecodeTiles,
    split_count,
    split_start,
)
from splitserve.kernels.decode_tile import (
    attend_tile,
    beside,
    fold,
    load_parts,
    load_rows,
    no_sum,
    normalised,
    store_rows,
)
from splitserve.kernels.head_sizes import runs_on_gpu
from splitserve.kernels.prefetch import load_early, prefetch_l2

LOG2_E = 1.4426950408889634
PREFETCHED = 256  # tokens of a program's run that it asks for before the kernel in front has ended


def decode_attention(
    q: torch.Tensor,
    cache_layer: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    plan: DecodePlan,
    scratch: DecodeScratch,
    tiles: DecodeTiles,
    *,
    value_dim: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from `q` [slots, q_len, heads, dim] over `cache_layer` [planes, pages, kv_heads, page_size, dim].

    Keys are plane 0 and values plane 1; with `value_dim`, values are the first `value_dim` numbers of the keys.
    `lengths` [slots] int32 counts a slot's tokens in the cache, its queries' included (causal among them); a slot of
    length 0 is idle and its result is 0. `block_table` [slots, max_pages] int32. `plan` was filled for these lengths by
    `plan_decode`, with `tiles.splits`; lengths must fit the block table and `scratch`, which the host cannot check.
    What lies in the pages behind a slot's length is never read. Returns `out` [slots, q_len, heads, value_dim] in q's
    dtype, computed in float32. Raises ValueError for shapes that the kernels do not support.
    """
    shape = _checked_shape(q, cache_layer, block_table, lengths, plan, tiles, value_dim)
    if out is None:
        out = q.new_empty(len(q), shape.q_len, shape.heads, shape.value_dim)
    interpreted = not q.is_cuda  # the interpreter's dot is wrong in bfloat16
    main, pdl = shape.value_dim, tiles.pdl and not interpreted
    _decode_kernel[(tiles.lanes(shape), plan.programs)](
        q, cache_layer, block_table, lengths, out, plan.pieces, plan.slots, scratch.acc, scratch.stats,
        scratch.arrived, scale * LOG2_E, cache_layer.stride(0), block_table.stride(0),
        HEADS=shape.heads, KV_HEADS=shape.kv_heads, Q_LEN=shape.q_len, VALUE_DIM=main, REST=shape.dim - main,
        LATENT=shape.latent, PAGE=shape.page_size, BLOCK_ROWS=tiles.block_rows, BLOCK_KEYS=tiles.block_keys,
        PARTS=tiles.parts, KEYS_FIRST=tiles.keys_first, UPCAST=interpreted, PREFETCHED=PREFETCHED,
        FRONT_STEP=plan.splits.front_step, FRONT=plan.splits.front, STEP=plan.splits.step,
        COMBINE=tiles.combine, PDL=pdl, launch_pdl=pdl, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if tiles.combine:
        rows = shape.q_len * shape.heads
        _combine_kernel[(len(q), rows)](
            lengths, out, plan.slots, scratch.acc, scratch.stats,
            ALL_ROWS=rows, VALUE_DIM=main, FRONT_STEP=plan.splits.front_step, FRONT=plan.splits.front,
            STEP=plan.splits.step, PDL=pdl, launch_pdl=pdl, num_warps=4 if main >= 512 else 1,
        )  # fmt: skip
    return out


def decode_attention_reference(
    q: torch.Tensor,
    cache_layer: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    value_dim: int | None = None,
) -> torch.Tensor:
    """The same in float64, slot by slot."""
    slots, q_len, heads, dim = q.shape
    out = q.new_zeros(slots, q_len, heads, value_dim or dim, dtype=torch.float64)
    for slot, length in enumerate(lengths.tolist()):
        if not length:
            continue
        pages = cache_layer[:, block_table[slot, : -(-length // cache_layer.shape[3])].long()]
        planes = pages.transpose(1, 2).flatten(2, 3)[:, :, :length].double()  # [planes, kv heads, tokens, dim]
        planes = planes.repeat_interleave(heads // planes.shape[1], 1)
        scores = torch.einsum("qhd,htd->hqt", q[slot].double() * scale, planes[0])
        late = torch.arange(length, device=q.device) > torch.arange(length - q_len, length, device=q.device)[:, None]
        weights = scores.masked_fill(late, -torch.inf).softmax(-1)
        out[slot] = torch.einsum("hqt,htd->qhd", weights, planes[-1, ..., : value_dim or dim])
    return out


def _checked_shape(
    q: torch.Tensor,
    cache_layer: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    plan: DecodePlan,
    tiles: DecodeTiles,
    value_dim: int | None,
) -> DecodeShape:
    slots, q_len, heads, dim = q.shape
    planes, _, kv_heads, page_size, cache_dim = cache_layer.shape
    shape = DecodeShape(heads, kv_heads, dim, value_dim or dim, page_size, q_len)
    if cache_dim != dim or planes != (1 if shape.latent else 2) or heads % kv_heads:
        raise ValueError(f"q {tuple(q.shape)} does not fit a cache layer {tuple(cache_layer.shape)}")
    if not runs_on_gpu(dim, shape.value_dim) or page_size & (page_size - 1) or page_size < 16:
        raise ValueError(f"value_dim, dim - value_dim and page_size must be powers of two from 16 on: {shape}")
    if block_table.shape[0] != slots or lengths.shape != (slots,) or len(plan.slots) != slots:
        raise ValueError(f"block_table, lengths and plan must be for the {slots} slots of q")
    if block_table.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise ValueError("block_table and lengths must be int32")
    if tiles.splits != plan.splits or plan.splits.front_step % tiles.block_keys:
        raise ValueError(f"tiles {tiles} do not fit the plan's {plan.splits}")
    if not (q.is_contiguous() and cache_layer[0].is_contiguous() and block_table.stride(1) == 1):
        raise ValueError("q, cache_layer and the rows of block_table must be contiguous")
    return shape


@triton.jit  # type: ignore[untyped-decorator]
def _load_pages(block_table, start, stop, PAGE: tl.constexpr, BLOCK_KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The page of the tile at `start`, or of each of its keys where pages are shorter than tiles."""
    if PAGE >= BLOCK_KEYS:
        pages = tl.load(block_table + start // PAGE, mask=start < stop, other=0)
    else:
        position = start + tl.arange(0, BLOCK_KEYS)
        pages = tl.load(block_table + position // PAGE, mask=position < stop, other=0)
    return pages.to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _store_partial(  # type: ignore[no-untyped-def]
    partial, stats, split, row, valid, top, total, acc,
    ALL_ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, PARTS: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    tl.store(stats + split * (2 * ALL_ROWS) + row, top, mask=valid)
    tl.store(stats + split * (2 * ALL_ROWS) + ALL_ROWS + row, total, mask=valid)
    for i in tl.static_range(PARTS):
        store_rows(partial + split.to(tl.int64) * (ALL_ROWS * VALUE_DIM), row, valid, acc[i], VALUE_DIM, i, KEYS_FIRST)


@triton.jit(do_not_specialize=["table_stride"])  # type: ignore[untyped-decorator]
def _decode_kernel(  # type: ignore[no-untyped-def]
    q, cache, block_table, lengths, out, pieces, slot_plans, partial, stats, arrived,
    scale, plane_stride, table_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, Q_LEN: tl.constexpr, VALUE_DIM: tl.constexpr, REST: tl.constexpr,
    LATENT: tl.constexpr, PAGE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    PARTS: tl.constexpr, KEYS_FIRST: tl.constexpr, UPCAST: tl.constexpr, PREFETCHED: tl.constexpr,
    FRONT_STEP: tl.constexpr, FRONT: tl.constexpr, STEP: tl.constexpr, COMBINE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (lane, p) computes piece p of the plan for one KV head's block of rows."""
    if PDL:
        gdc_launch_dependents()
    GROUP: tl.constexpr = HEADS // KV_HEADS
    ROW_BLOCKS: tl.constexpr = (Q_LEN * GROUP + BLOCK_ROWS - 1) // BLOCK_ROWS
    DIM: tl.constexpr = VALUE_DIM + REST
    ALL_ROWS: tl.constexpr = Q_LEN * HEADS
    lane, program = tl.program_id(0), tl.program_id(1)
    kv_head = lane // ROW_BLOCKS
    lane_row = lane % ROW_BLOCKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid, query = lane_row < Q_LEN * GROUP, lane_row // GROUP
    row = query * HEADS + kv_head * GROUP + lane_row % GROUP

    slot, first_split = load_early(pieces + program * 4), load_early(pieces + program * 4 + 1)
    end_split, zeroed = load_early(pieces + program * 4 + 2), load_early(pieces + program * 4 + 3)
    length = load_early(lengths + tl.maximum(slot, 0))
    first = split_start(first_split, FRONT_STEP, FRONT, STEP)
    stop = tl.minimum(split_start(end_split, FRONT_STEP, FRONT, STEP), length)
    table = block_table + slot * table_stride
    if PDL:
        if (LATENT & (PAGE >= BLOCK_KEYS)) and first < stop:
            token = tl.minimum(first + tl.arange(0, PREFETCHED), stop - 1)
            page = load_early(table + token // PAGE).to(tl.int64)
            prefetch_l2(cache + ((page * KV_HEADS + kv_head) * PAGE + token % PAGE) * DIM, DIM * 2)
        gdc_wait()
    if zeroed >= 0:
        nothing = tl.zeros([BLOCK_ROWS, VALUE_DIM], tl.float32)
        store_rows(out + zeroed * (ALL_ROWS * VALUE_DIM), row, valid, nothing, VALUE_DIM, 0, False)
    if slot >= 0:
        slot_out = out + slot * (ALL_ROWS * VALUE_DIM)
        first_unit, folded = tl.load(slot_plans + slot * 3), tl.load(slot_plans + slot * 3 + 1)
        slot_pieces = tl.load(slot_plans + slot * 3 + 2)
        q_parts = load_parts(q + slot * (ALL_ROWS * DIM), row, valid, DIM, VALUE_DIM, PARTS, REST)
        in_one = (first_split == 0) | (end_split == first_split + 1)
        top, total, acc = _attend(
            q_parts, cache, table, first, stop, length, length - Q_LEN + query, kv_head, scale, plane_stride,
            in_one, partial, stats, first_unit + first_split, row, valid,
            KV_HEADS, ALL_ROWS, VALUE_DIM, REST, LATENT, PAGE, BLOCK_ROWS, BLOCK_KEYS, PARTS, KEYS_FIRST,
            FRONT_STEP, FRONT, STEP, UPCAST,
        )  # fmt: skip
        if slot_pieces == 1:
            for i in tl.static_range(PARTS):
                store_rows(
                    slot_out, row, valid, normalised(total, acc[i], KEYS_FIRST), VALUE_DIM, i, KEYS_FIRST
                )  # fmt: skip
        else:
            if in_one:
                _store_partial(
                    partial, stats, first_unit + end_split - 1, row, valid, top, total, acc,
                    ALL_ROWS, VALUE_DIM, PARTS, KEYS_FIRST,
                )  # fmt: skip
            if not COMBINE:
                tl.debug_barrier()  # what other threads have stored counts as this one's from here on
                counter = arrived + slot * tl.num_programs(0) + lane
                if tl.atomic_add(counter, 1, sem="acq_rel") == slot_pieces - 1:
                    tl.store(counter, 0)
                    splits = split_count(length, FRONT_STEP, FRONT, STEP)
                    _fold_partials(
                        partial, stats, slot_out, first_unit, folded - 1, splits, row, valid,
                        ALL_ROWS, VALUE_DIM, BLOCK_ROWS,
                    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q, cache, table, first, stop, length, last_seen, kv_head, scale, plane_stride,
    in_one, partial, stats, unit, row, valid,
    KV_HEADS: tl.constexpr, ALL_ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, REST: tl.constexpr,
    LATENT: tl.constexpr, PAGE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    PARTS: tl.constexpr, KEYS_FIRST: tl.constexpr,
    FRONT_STEP: tl.constexpr, FRONT: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attend over positions `first` to `stop`, whole splits of one slot.

    Returns the fold of their results, or if not `in_one` leaves each result in the scratch, from `unit` on.
    """
    DIM: tl.constexpr = VALUE_DIM + REST
    key = tl.arange(0, BLOCK_KEYS)
    top, total, acc = no_sum(BLOCK_ROWS, VALUE_DIM, PARTS, KEYS_FIRST)
    all_top, all_total, all_acc = top, total, acc
    # Carried from one tile to the next: a page number loaded where it is used would cost the pipeline its depth.
    next_pages = _load_pages(table, first, stop, PAGE, BLOCK_KEYS)
    for start in range(first, stop, BLOCK_KEYS):
        pages = next_pages
        next_pages = _load_pages(table, start + BLOCK_KEYS, stop, PAGE, BLOCK_KEYS)
        position = start + key
        # Keys behind the length may be NaN, which not even a weight of 0 would silence: the load makes them 0.
        here = position < length
        base = cache + (pages * KV_HEADS + kv_head) * (PAGE * DIM) if PAGE >= BLOCK_KEYS else cache
        key_row = position % PAGE if PAGE >= BLOCK_KEYS else (pages * KV_HEADS + kv_head) * PAGE + position % PAGE
        keys = load_parts(base, key_row, here, DIM, VALUE_DIM, PARTS, REST)
        values = keys
        if not LATENT:
            values = load_parts(base + plane_stride, key_row, here, DIM, VALUE_DIM, PARTS, 0)
        visible = (position[:, None] if KEYS_FIRST else position[None, :]) <= beside(last_seen, KEYS_FIRST)
        top, total, acc = attend_tile(q, keys, values, visible, scale, top, total, acc, KEYS_FIRST, UPCAST)
        step = tl.where(start < FRONT, FRONT_STEP, STEP)
        if ((start + BLOCK_KEYS) % step == 0) | (start + BLOCK_KEYS >= stop):
            if in_one:
                all_top, all_total, all_acc = fold(all_top, all_total, all_acc, top, total, acc, KEYS_FIRST)
            else:
                _store_partial(
                    partial, stats, unit, row, valid, top, total, acc, ALL_ROWS, VALUE_DIM, PARTS, KEYS_FIRST
                )
            unit += 1
            top, total, acc = no_sum(BLOCK_ROWS, VALUE_DIM, PARTS, KEYS_FIRST)
    return all_top, all_total, all_acc


@triton.jit  # type: ignore[untyped-decorator]
def _fold_partials(  # type: ignore[no-untyped-def]
    partial, stats, out, first_unit, begin, end, row, valid,
    ALL_ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The result of a slot whose splits from `begin` on are in the scratch."""
    top, total, acc = no_sum(ROWS, VALUE_DIM, 1, False)
    for split in tl.range(begin, end, loop_unroll_factor=4 if ROWS == 1 else 2):
        unit = first_unit + split
        split_stats = stats + unit * (2 * ALL_ROWS) + row
        split_acc = load_rows(partial + unit.to(tl.int64) * (ALL_ROWS * VALUE_DIM), row, valid, VALUE_DIM, 0, VALUE_DIM)
        split_top = tl.load(split_stats, mask=valid, other=float("-inf"))
        split_total = tl.load(split_stats + ALL_ROWS, mask=valid, other=0.0)
        top, total, acc = fold(top, total, acc, split_top, split_total, (split_acc,), False)
    store_rows(out, row, valid, normalised(total, acc[0], False), VALUE_DIM, 0, False)


@triton.jit  # type: ignore[untyped-decorator]
def _combine_kernel(  # type: ignore[no-untyped-def]
    lengths, out, slot_plans, partial, stats, ALL_ROWS: tl.constexpr, VALUE_DIM: tl.constexpr,
    FRONT_STEP: tl.constexpr, FRONT: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (slot, row) folds what several pieces left."""
    if PDL:
        gdc_launch_dependents()
    slot, row = tl.program_id(0), tl.program_id(1) + tl.arange(0, 1)
    first_unit, folded = load_early(slot_plans + slot * 3), load_early(slot_plans + slot * 3 + 1)
    splits = split_count(load_early(lengths + slot), FRONT_STEP, FRONT, STEP)
    several = load_early(slot_plans + slot * 3 + 2) > 1
    if PDL:
        gdc_wait()
    if several:
        _fold_partials(
            partial, stats, out + slot * (ALL_ROWS * VALUE_DIM), first_unit, folded - 1, splits, row, row < ALL_ROWS,
            ALL_ROWS, VALUE_DIM, 1,
        )  # fmt: skip
