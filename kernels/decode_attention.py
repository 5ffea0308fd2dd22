"""Decode attention over pages: grouped-query attention and absorbed MLA, for batches whose lengths the device knows.

FlashDecoding's split-KV with FlashMLA's fixed grid: every program computes its run of the plan's splits
(`decode_plan`) and `_combine_kernel` folds what several programs left of one slot, in the order of positions. Both
fold with the same operations in the same order, so a slot's bits depend on its own queries and context alone: not on
its neighbours, its place, the number of programs, or the page size.

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
from splitserve.kernels.prefetch import prefetch_l2

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
    slots = len(q)
    if out is None:
        out = q.new_empty(slots, shape.q_len, shape.heads, shape.value_dim)
    interpreted = not q.is_cuda  # the interpreter's dot is wrong in bfloat16
    main, pdl = shape.value_dim, tiles.pdl and not interpreted
    sizes = {
        "HEADS": shape.heads, "Q_LEN": shape.q_len, "VALUE_DIM": main, "PDL": pdl, "launch_pdl": pdl,
        "FRONT_STEP": plan.splits.front_step, "FRONT": plan.splits.front, "STEP": plan.splits.step,
    }  # fmt: skip
    _decode_kernel[(tiles.lanes(shape), plan.programs)](
        q, cache_layer, block_table, lengths, out, plan.order,
        plan.boundaries, plan.slots, scratch.acc, scratch.stats, scale * LOG2_E, cache_layer.stride(0),
        block_table.stride(0),
        KV_HEADS=shape.kv_heads, REST=shape.dim - main, LATENT=shape.latent, PAGE=shape.page_size,
        BLOCK_ROWS=tiles.block_rows, BLOCK_KEYS=tiles.block_keys, PARTS=tiles.parts, KEYS_FIRST=tiles.keys_first,
        UPCAST=interpreted, PREFETCHED=PREFETCHED, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages, **sizes,
    )  # fmt: skip
    combined_rows = 1 if slots <= 16 else 4  # most of many slots need no combining: few programs find that out sooner
    _combine_kernel[(slots, -(-shape.q_len * shape.heads // combined_rows))](
        lengths, out, plan.slots, scratch.acc, scratch.stats,
        ROWS=combined_rows, num_warps=4 if main >= 512 else 1, **sizes,
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
def _attend(  # type: ignore[no-untyped-def]
    q, cache, block_table, first, stop, length, last_seen, kv_head, scale, plane_stride,
    KV_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, REST: tl.constexpr, LATENT: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, PARTS: tl.constexpr, KEYS_FIRST: tl.constexpr,
    FRONT_STEP: tl.constexpr, FRONT: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attend over positions `first` to `stop`, whole splits of one slot: the fold of their results."""
    DIM: tl.constexpr = VALUE_DIM + REST
    key = tl.arange(0, BLOCK_KEYS)
    top, total, acc = no_sum(BLOCK_ROWS, VALUE_DIM, PARTS, KEYS_FIRST)
    all_top, all_total, all_acc = top, total, acc
    # Carried from one tile to the next: a page number loaded where it is used would cost the pipeline its depth.
    next_pages = _load_pages(block_table, first, stop, PAGE, BLOCK_KEYS)
    for start in range(first, stop, BLOCK_KEYS):
        pages = next_pages
        next_pages = _load_pages(block_table, start + BLOCK_KEYS, stop, PAGE, BLOCK_KEYS)
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
            all_top, all_total, all_acc = fold(all_top, all_total, all_acc, top, total, acc, KEYS_FIRST)
            top, total, acc = no_sum(BLOCK_ROWS, VALUE_DIM, PARTS, KEYS_FIRST)
    return all_total, all_top, all_acc


@triton.jit(do_not_specialize=["table_stride"])  # type: ignore[untyped-decorator]
def _decode_kernel(  # type: ignore[no-untyped-def]
    q, cache, block_table, lengths, out, order, boundaries, slot_plans, partial, stats,
    scale, plane_stride, table_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, Q_LEN: tl.constexpr, VALUE_DIM: tl.constexpr, REST: tl.constexpr,
    LATENT: tl.constexpr, PAGE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    PARTS: tl.constexpr, KEYS_FIRST: tl.constexpr, FRONT_STEP: tl.constexpr, FRONT: tl.constexpr,
    STEP: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr, PREFETCHED: tl.constexpr,
):  # fmt: skip
    """Program (lane, p) computes run p of the plan for one KV head's block of rows."""
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

    first, first_split = tl.load(boundaries + program * 2), tl.load(boundaries + program * 2 + 1)
    last, last_split = tl.load(boundaries + program * 2 + 2), tl.load(boundaries + program * 2 + 3)
    live = tl.load(boundaries + tl.num_programs(1) * 2)
    if PDL:
        if (LATENT & (PAGE >= BLOCK_KEYS)) and first < live:
            slot = tl.load(order + first)
            token = split_start(first_split, FRONT_STEP, FRONT, STEP) + tl.arange(0, PREFETCHED)
            token = tl.minimum(token, tl.load(lengths + slot) - 1)
            page = tl.load(block_table + slot * table_stride + token // PAGE).to(tl.int64)
            prefetch_l2(cache + ((page * KV_HEADS + kv_head) * PAGE + token % PAGE) * DIM, DIM * 2)
        gdc_wait()
    for place in range(first, tl.minimum(last + 1, live)):
        slot = tl.load(order + place)
        length = tl.load(lengths + slot)
        base_unit, folded = tl.load(slot_plans + slot * 2), tl.load(slot_plans + slot * 2 + 1)
        splits = split_count(length, FRONT_STEP, FRONT, STEP)
        begin = tl.where(place == first, first_split, 0)
        end = tl.where(place == last, last_split, splits)
        stop = tl.minimum(split_start(end, FRONT_STEP, FRONT, STEP), length)
        slot_row = slot * ALL_ROWS
        q_parts = load_parts(q + slot_row * DIM, row, valid, DIM, VALUE_DIM, PARTS, REST)

        # A program that starts the slot folds all its splits in one go; one that takes it over leaves each by itself.
        for part in range(begin, tl.where(begin == 0, tl.minimum(end, 1), end)):
            start = split_start(part, FRONT_STEP, FRONT, STEP)
            part_stop = tl.where(begin == 0, stop, split_start(part + 1, FRONT_STEP, FRONT, STEP))
            total, top, acc = _attend(
                q_parts, cache, block_table + slot * table_stride, start,
                tl.minimum(part_stop, stop), length, length - Q_LEN + query, kv_head, scale, plane_stride,
                KV_HEADS, VALUE_DIM, REST, LATENT, PAGE, BLOCK_ROWS, BLOCK_KEYS, PARTS, KEYS_FIRST,
                FRONT_STEP, FRONT, STEP, UPCAST,
            )  # fmt: skip
            if (begin == 0) & (folded == splits):
                for i in tl.static_range(PARTS):
                    mean = normalised(total, acc[i], KEYS_FIRST)
                    store_rows(out + slot_row * VALUE_DIM, row, valid, mean, VALUE_DIM, i, KEYS_FIRST)
            else:
                unit = base_unit + start // FRONT_STEP
                tl.store(stats + unit * (2 * ALL_ROWS) + row, top, mask=valid)
                tl.store(stats + unit * (2 * ALL_ROWS) + ALL_ROWS + row, total, mask=valid)
                unit_acc = partial + unit.to(tl.int64) * (ALL_ROWS * VALUE_DIM)
                for i in tl.static_range(PARTS):
                    store_rows(unit_acc, row, valid, acc[i], VALUE_DIM, i, KEYS_FIRST)


@triton.jit  # type: ignore[untyped-decorator]
def _combine_kernel(  # type: ignore[no-untyped-def]
    lengths, out, slot_plans, partial, stats,
    HEADS: tl.constexpr, Q_LEN: tl.constexpr, VALUE_DIM: tl.constexpr, ROWS: tl.constexpr,
    FRONT_STEP: tl.constexpr, FRONT: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (slot, block of rows) folds what several programs left of a slot; idle slots get 0."""
    if PDL:
        gdc_launch_dependents()
    slot = tl.program_id(0)
    ALL_ROWS: tl.constexpr = Q_LEN * HEADS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = row < ALL_ROWS
    base_unit, folded = tl.load(slot_plans + slot * 2), tl.load(slot_plans + slot * 2 + 1)
    splits = split_count(tl.load(lengths + slot), FRONT_STEP, FRONT, STEP)
    if PDL:
        gdc_wait()
    if (folded < splits) | (splits == 0):
        top, total, acc = no_sum(ROWS, VALUE_DIM, 1, False)
        for split in tl.range(tl.maximum(folded - 1, 0), splits, loop_unroll_factor=4):
            start = split_start(split, FRONT_STEP, FRONT, STEP) // FRONT_STEP
            unit = base_unit + tl.where(split < folded, 0, start)
            split_stats = stats + unit * (2 * ALL_ROWS) + row
            split_acc = load_rows(
                partial + unit.to(tl.int64) * (ALL_ROWS * VALUE_DIM), row, valid, VALUE_DIM, 0, VALUE_DIM
            )
            split_top = tl.load(split_stats, mask=valid, other=float("-inf"))
            split_total = tl.load(split_stats + ALL_ROWS, mask=valid, other=0.0)
            top, total, acc = fold(top, total, acc, split_top, split_total, (split_acc,), False)
        slot_out = out + slot * (ALL_ROWS * VALUE_DIM)
        store_rows(slot_out, row, valid, normalised(total, acc[0], False), VALUE_DIM, 0, False)
