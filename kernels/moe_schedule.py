"""Which block of slots holds which choices of experts, worked out on the device: histogram, scan, scatter.

A *choice* is one of a token's experts, numbered token * top_k + place. Every expert owns whole blocks of `block_m`
slots, and its choices fill them in the order of their numbers, whatever the timing:

    expert 0: | 1  6  9  -1 |                  3 choices, 1 block
    expert 2: | 0  2  4   5 | 7 -1 -1 -1 |     5 choices, 2 blocks

Kernels that stride over the live blocks then load only experts that somebody chose. Shapes depend on the capacity
(rows * top_k choices) alone, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

CHUNK = 4096  # choices that one program ranks; more of them are counted by a kernel of its own first


@dataclass(frozen=True, eq=False)
class BlockSchedule:
    """Live blocks come first; what lies behind them is undefined.

    `slots` [max_blocks * block_m] int32: the choice in each slot, -1 for none. `experts` [max_blocks] int32: each
    block's expert, counted from the first local one. `num_blocks` [1] int32: how many blocks are live.
    """

    slots: torch.Tensor
    experts: torch.Tensor
    num_blocks: torch.Tensor
    block_m: int

    @property
    def max_blocks(self) -> int:
        return self.experts.numel()


def max_blocks(num_choices: int, num_experts: int, block_m: int) -> int:
    """The most blocks that `num_choices` can need: as many last blocks as can be with one slot taken."""
    taken = min(num_choices, num_experts)
    return (num_choices + taken * (block_m - 1)) // block_m


def block_schedule(
    chosen: torch.Tensor,
    live_rows: torch.Tensor,
    num_experts: int,
    block_m: int,
    *,
    first_expert: int = 0,
    pdl: bool = False,
) -> BlockSchedule:
    """Schedule the choices `chosen` [rows, top_k] (int32 or int64, contiguous) of the first `live_rows` [1] rows.

    Choices outside `first_expert` to `first_expert + num_experts` belong to other ranks and get no slot. `pdl` lets
    the kernel, and with it those behind, start while the one before it runs (programmatic dependent launch).
    """
    # As for the next power of two of rows: kernels of the numbers between them are the same (`moe_tiles.expert_tiles`).
    room = triton.next_power_of_2(len(chosen)) * chosen.shape[1]
    chunk = min(CHUNK, max(32, triton.next_power_of_2(room)))
    chunks, bins = triton.cdiv(room, chunk), max(4, triton.next_power_of_2(num_experts))
    blocks = max_blocks(chosen.numel(), num_experts, block_m)
    # One allocation, so that the scratch's memory lives as long as the schedule: the kernel behind may begin early.
    # Each part starts at a multiple of 16 bytes, whatever the number of rows: alignment is compiled into kernels.
    sizes = [4, chunks * bins, blocks * block_m, blocks]
    num_blocks, counts, slots, experts = torch.split(chosen.new_empty(sum(sizes), dtype=torch.int32), sizes)
    shape = {"TOP_K": chosen.shape[1], "FIRST": first_expert, "EXPERTS": num_experts}
    options = {"CHUNK": chunk, "BINS": bins, "PDL": pdl, "launch_pdl": pdl, "num_warps": 4 if chunk <= 1024 else 8}
    if chunks > 1:
        _count_kernel[(chunks,)](chosen, live_rows, counts, chosen.shape[0], **shape, **options)
    _place_kernel[(num_experts, chunks)](
        chosen,
        live_rows,
        counts,
        slots,
        experts,
        num_blocks,
        chosen.shape[0],
        ONE_CHUNK=chunks == 1,
        BLOCK_M=block_m,
        **shape,
        **options,
    )
    return BlockSchedule(slots, experts, num_blocks[:1], block_m)


def block_schedule_reference(
    chosen: torch.Tensor, live_rows: int, num_experts: int, block_m: int, first_expert: int = 0
) -> list[tuple[int, list[int]]]:
    """The live blocks as (expert, the choices in its slots)."""
    flat = chosen[:live_rows].flatten().tolist()
    blocks = []
    for expert in range(num_experts):
        own = [choice for choice, chosen_expert in enumerate(flat) if chosen_expert == first_expert + expert]
        for start in range(0, len(own), block_m):
            block = own[start : start + block_m]
            blocks.append((expert, block + [-1] * (block_m - len(block))))
    return blocks


@triton.jit  # type: ignore[untyped-decorator]
def _live_choices(  # type: ignore[no-untyped-def]
    chosen, live_rows, chunk, rows,
    TOP_K: tl.constexpr, FIRST: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A chunk's choices and their experts, -1 where a choice does not count."""
    choices = chunk * CHUNK + tl.arange(0, CHUNK)
    live = choices < tl.minimum(tl.load(live_rows), rows) * TOP_K
    experts = tl.load(chosen + choices, mask=live, other=0).to(tl.int32) - FIRST
    return choices, tl.where(live & (experts >= 0) & (experts < EXPERTS), experts, -1)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _count_kernel(  # type: ignore[no-untyped-def]
    chosen, live_rows, counts, rows,
    TOP_K: tl.constexpr, FIRST: tl.constexpr, EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr, BINS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """counts [chunks, BINS]: how often a chunk's choices name each expert."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    chunk = tl.program_id(0)
    _, experts = _live_choices(chosen, live_rows, chunk, rows, TOP_K, FIRST, EXPERTS, CHUNK)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), tl.histogram(experts, BINS, mask=experts >= 0))


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _place_kernel(  # type: ignore[no-untyped-def]
    chosen, live_rows, counts, slots, block_experts, num_blocks, rows,
    TOP_K: tl.constexpr, FIRST: tl.constexpr, EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (expert, chunk) gives slots to the chunk's choices of that expert."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert, chunk = tl.program_id(0), tl.program_id(1)
    choices, experts = _live_choices(chosen, live_rows, chunk, rows, TOP_K, FIRST, EXPERTS, CHUNK)
    bins = tl.arange(0, BINS)
    if ONE_CHUNK:
        totals = tl.histogram(experts, BINS, mask=experts >= 0)
        before = 0
    else:
        totals = tl.zeros((BINS,), tl.int32)
        before = 0
        for other in range(tl.num_programs(1)):
            count = tl.load(counts + other * BINS + bins)
            totals += count
            before += tl.sum(tl.where((bins == expert) & (other < chunk), count, 0))
    total = tl.sum(tl.where(bins == expert, totals, 0))
    blocks = (totals + BLOCK_M - 1) // BLOCK_M
    first_block = tl.sum(tl.where(bins < expert, blocks, 0))

    mine = experts == expert
    rank = before + tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(slots + first_block * BLOCK_M + rank, choices, mask=mine)
    if chunk == 0:
        own_blocks = (total + BLOCK_M - 1) // BLOCK_M
        empty = total + tl.arange(0, BLOCK_M)
        tl.store(slots + first_block * BLOCK_M + empty, -1, mask=empty < own_blocks * BLOCK_M)
        for start in range(0, own_blocks, 128):
            block = start + tl.arange(0, 128)
            tl.store(block_experts + first_block + block, expert, mask=block < own_blocks)
        if expert == 0:
            tl.store(num_blocks, tl.sum(blocks))
