"""Gate and up of routed experts for many rows: tokens gathered into slots first, then one wide product.

With the tokens of a block side by side in memory both operands come in whole tiles (TMA), and gate and up rows of the
weights make one tile of twice the width. Rows are copied top_k times for it, which pays where an expert has more than
a block of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from splitserve.kernels.launch import INTERPRETING
from splitserve.kernels.moe_schedule import BlockSchedule
from splitserve.kernels.moe_tiles import GemmTile

GATHER_ROWS = 4


def gathered_gate_up(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    schedule: BlockSchedule,
    top_k: int,
    tile: GemmTile,
    sms: int,
) -> torch.Tensor:
    """silu(gate(x)) * up(x) of each slot's token: [max_blocks * block_m, width], of x's dtype.

    `x` [rows, hidden] and `gate_up` [experts, 2 * width, hidden], gate rows first, are contiguous. Slots of no choice
    and blocks that are not live hold anything.
    """
    hidden, width = x.shape[1], gate_up.shape[1] // 2
    act = x.new_empty(schedule.slots.numel(), width)
    halves = TensorDescriptor.from_tensor(gate_up.view(-1, width, hidden), [2, tile.block_n, tile.block_k])
    rows = TensorDescriptor.from_tensor(_gather(x, schedule, top_k), [schedule.block_m, tile.block_k])
    programs = min(sms * tile.programs_per_sm, schedule.max_blocks * triton.cdiv(width, tile.block_n))
    _wide_kernel[(programs,)](
        rows, halves, act, schedule.experts, schedule.num_blocks,
        HIDDEN=hidden, WIDTH=width, BLOCK_M=schedule.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        UPCAST=INTERPRETING and x.dtype != torch.float32, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return act


def _gather(x: torch.Tensor, schedule: BlockSchedule, top_k: int) -> torch.Tensor:
    """Rows of x in the order of slots; those of no choice hold row 0, those behind the live blocks anything."""
    rows = x.new_empty(schedule.slots.numel(), x.shape[1])
    _gather_kernel[(len(rows) // GATHER_ROWS,)](
        x, schedule.slots, rows, schedule.num_blocks, HIDDEN=x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]),
        TOP_K=top_k, BLOCK_M=schedule.block_m, ROWS=GATHER_ROWS,
    )  # fmt: skip
    return rows


@triton.jit  # type: ignore[untyped-decorator]
def _gather_kernel(  # type: ignore[no-untyped-def]
    x, slots, rows, num_blocks,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= tl.load(num_blocks) * BLOCK_M:
        return
    token = tl.maximum(tl.load(slots + slot), 0) // TOP_K
    column = tl.arange(0, BLOCK)[None, :]
    values = tl.load(x + token.to(tl.int64)[:, None] * HIDDEN + column, mask=column < HIDDEN)
    tl.store(rows + slot.to(tl.int64)[:, None] * HIDDEN + column, values, mask=column < HIDDEN)


@triton.jit  # type: ignore[untyped-decorator]
def _wide_kernel(  # type: ignore[no-untyped-def]
    rows, halves, act, block_experts, num_blocks,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    n_tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    # Flattened, so that a tile's first loads start under the end of the tile before.
    for tile in tl.range(tl.program_id(0), tl.load(num_blocks) * n_tiles, tl.num_programs(0), flatten=True):
        block, column = tile // n_tiles, tile % n_tiles * BLOCK_N
        expert = tl.load(block_experts + block)
        both = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for k in range(0, HIDDEN, BLOCK_K):
            tokens = rows.load([block * BLOCK_M, k])
            weights = halves.load([2 * expert, column, k]).reshape(2 * BLOCK_N, BLOCK_K)
            if UPCAST:
                tokens, weights = tokens.to(tl.float32), weights.to(tl.float32)
            both = tl.dot(tokens, tl.trans(weights), both, input_precision="ieee")
        gate, up = tl.split(tl.permute(tl.reshape(both, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
        gated = (gate / (1.0 + tl.exp(-gate)) * up).to(act.dtype.element_ty)
        slot, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)[None, :]
        tl.store(act + slot.to(tl.int64)[:, None] * WIDTH + columns, gated, mask=columns < WIDTH)
