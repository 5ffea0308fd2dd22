"""The two grouped GEMMs of a layer's experts: persistent programs that stride over tiles of live blocks.

With `swap` the weights are the M operand of the MMA. Shared experts come first: their tiles need no schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from splitserve.kernels.launch import INTERPRETING
from splitserve.kernels.moe_schedule import BlockSchedule
from splitserve.kernels.moe_tiles import ExpertTiles, GemmTile
from splitserve.kernels.prefetch import load_early


@dataclass(frozen=True, eq=False)
class Choices:
    """Experts that rows chose: `chosen` [rows, top_k], of which the first `live_rows` [1] int32 rows count.

    The last `shared` choices of each row are not in the schedule: they are the layer's last experts, in order.
    """

    chosen: torch.Tensor
    live_rows: torch.Tensor
    shared: int

    def shared_blocks(self, shared_m: int) -> int:
        """Blocks of each shared expert: a row's slot is its number."""
        return -(-len(self.chosen) // shared_m) if self.shared else 0


def grouped_gate_up(
    x: torch.Tensor, gate_up: torch.Tensor, schedule: BlockSchedule, choices: Choices, tiles: ExpertTiles, sms: int
) -> torch.Tensor:
    """silu(gate(x)) * up(x) of each slot's token [slots, width]; those of shared experts follow the schedule's.

    `x` [rows, hidden] and `gate_up` [experts, 2 * width, hidden], gate rows first, are contiguous. Slots of no choice
    or of rows that are not live hold anything.
    """
    hidden, width = x.shape[1], gate_up.shape[1] // 2
    tile = tiles.gate_up.for_width(hidden)
    shared_at, shared_rows = _shared_slots(schedule, choices, tiles)
    act = x.new_empty(shared_at + choices.shared * shared_rows, width)
    _gate_up_kernel[(_programs(tile, tiles, schedule, choices, width, sms),)](
        x, _tiled(x, tiles.shared_m or tiles.block_m, tile), _tiled(gate_up, tile.block_n, tile), act,
        schedule.slots, schedule.experts, schedule.num_blocks, choices.live_rows, shared_at, shared_rows,
        HIDDEN=hidden, WIDTH=width, EXPERTS=len(gate_up), **_options(x, choices, tiles, tile),
    )  # fmt: skip
    return act


def grouped_down(
    act: torch.Tensor, down: torch.Tensor, schedule: BlockSchedule, choices: Choices, tiles: ExpertTiles, sms: int
) -> torch.Tensor:
    """The product of each slot in its choice's place: [rows * top_k, hidden], the rest anything.

    `act` as `grouped_gate_up` returns it; `down` [experts, hidden, width].
    """
    experts, hidden, width = down.shape
    tile = tiles.down.for_width(width)
    parts = act.new_empty(choices.chosen.numel(), hidden)
    _down_kernel[(_programs(tile, tiles, schedule, choices, hidden, sms),)](
        _tiled(act, tiles.block_m, tile), _tiled(act, tiles.shared_m or tiles.block_m, tile),
        _tiled(down, tile.block_n, tile), parts, schedule.slots, schedule.experts, schedule.num_blocks,
        choices.live_rows, *_shared_slots(schedule, choices, tiles), HIDDEN=hidden, WIDTH=width, EXPERTS=experts,
        **_options(act, choices, tiles, tile),
    )  # fmt: skip
    return parts


def _tiled(matrix: torch.Tensor, block_rows: int, tile: GemmTile) -> TensorDescriptor:
    """For loads of [block_rows, block_k] tiles of `matrix` [..., k], seen as [rows, k]; 0 outside it."""
    return TensorDescriptor.from_tensor(matrix.flatten(0, -2), [block_rows, tile.block_k])


def _shared_slots(schedule: BlockSchedule, choices: Choices, tiles: ExpertTiles) -> tuple[int, int]:
    """The first slot of shared experts, and how many each has. No constants: they differ with the number of rows."""
    return schedule.slots.numel(), choices.shared_blocks(tiles.shared_m) * tiles.shared_m


def _programs(
    tile: GemmTile, tiles: ExpertTiles, schedule: BlockSchedule, choices: Choices, columns: int, sms: int
) -> int:
    """As many as fit, but no more than there can be tiles."""
    blocks = schedule.max_blocks + choices.shared * choices.shared_blocks(tiles.shared_m)
    return min(sms * tile.programs_per_sm, blocks * -(-columns // tile.block_n))


def _options(x: torch.Tensor, choices: Choices, tiles: ExpertTiles, tile: GemmTile) -> dict[str, Any]:
    """What both GEMMs take. The interpreter's bfloat16 `tl.dot` returns garbage: there it gets float32."""
    return {
        "TOP_K": choices.chosen.shape[1],
        "SHARED": choices.shared,
        "SHARED_M": tiles.shared_m,
        "SHARED_STAGES": tile.shared_stages,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "SWAP": tile.swap,
        "UPCAST": INTERPRETING and x.dtype != torch.float32,
        "PDL": tiles.pdl,
        "launch_pdl": tiles.pdl,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@triton.jit  # type: ignore[untyped-decorator]
def _multiply_add(tokens, weights, acc, SWAP: tl.constexpr, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + tokens [m, k] @ weights [n, k]^T, or its transpose."""
    if UPCAST:
        tokens, weights = tokens.to(tl.float32), weights.to(tl.float32)
    if SWAP:
        acc = tl.dot(weights, tl.trans(tokens), acc, input_precision="ieee")
    else:
        acc = tl.dot(tokens, tl.trans(weights), acc, input_precision="ieee")
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def _place(tile, blocks, n_tiles, SWAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile's block and strip. A block's strips go side by side; with many small blocks, the blocks of a strip do,
    so that blocks of one expert read its weights together."""
    across = SWAP & (blocks > 16)
    return tl.where(across, tile % blocks, tile // n_tiles), tl.where(across, tile // blocks, tile % n_tiles)


@triton.jit
def _shared_place(tile, row_blocks, n_tiles):  # type: ignore[no-untyped-def]
    """The tile's shared expert, strip and block of rows. A strip's blocks of rows go side by side."""
    return tile // (row_blocks * n_tiles), tile // row_blocks % n_tiles, tile % row_blocks


@triton.jit
def _behind(taken, programs):  # type: ignore[no-untyped-def]
    """This program's first tile of a list that follows `taken` tiles dealt out in turn."""
    return (tl.program_id(0) + programs - taken % programs) % programs


@triton.jit  # type: ignore[untyped-decorator]
def _store_act(act, gate, up, rows, column, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """silu(gate) * up into a strip of `rows` of act."""
    gated = (gate / (1.0 + tl.exp(-gate)) * up).to(act.dtype.element_ty)
    if SWAP:
        gated = tl.trans(gated)
    columns = column + tl.arange(0, BLOCK_N)[None, :]
    tl.store(act + rows.to(tl.int64)[:, None] * WIDTH + columns, gated, mask=columns < WIDTH)


@triton.jit  # type: ignore[untyped-decorator]
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x, x_tiles, gate_up, act, slots, block_experts, num_blocks, live_rows, shared_at, shared_rows,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    SHARED: tl.constexpr, SHARED_M: tl.constexpr, SHARED_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        # The gate's product (`matmul.GATE`) lets those behind it start when x is there: shared experts need no more.
        if SHARED == 0:
            gdc_wait()
    n_tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    even: tl.constexpr = HIDDEN % BLOCK_K == 0
    programs = tl.num_programs(0)
    first = tl.program_id(0)
    if SHARED:
        row_blocks = tl.cdiv(load_early(live_rows), SHARED_M)
        shared_tiles = SHARED * n_tiles * row_blocks
        for tile in tl.range(tl.program_id(0), shared_tiles, programs):
            expert, column, row_block = _shared_place(tile, row_blocks, n_tiles)
            column *= BLOCK_N
            gate_row = (EXPERTS - SHARED + expert) * (2 * WIDTH) + column
            gate = tl.zeros((BLOCK_N, SHARED_M) if SWAP else (SHARED_M, BLOCK_N), tl.float32)
            up = tl.zeros((BLOCK_N, SHARED_M) if SWAP else (SHARED_M, BLOCK_N), tl.float32)
            for k in tl.range(0, HIDDEN, BLOCK_K, num_stages=SHARED_STAGES):
                tokens = x_tiles.load([row_block * SHARED_M, k])
                gate = _multiply_add(tokens, gate_up.load([gate_row, k]), gate, SWAP, UPCAST)
                up = _multiply_add(tokens, gate_up.load([gate_row + WIDTH, k]), up, SWAP, UPCAST)
            rows = shared_at + expert * shared_rows + row_block * SHARED_M + tl.arange(0, SHARED_M)
            _store_act(act, gate, up, rows, column, WIDTH, BLOCK_N, SWAP)
        first = _behind(shared_tiles, programs)
        if PDL:
            gdc_wait()
    blocks = tl.load(num_blocks)
    for tile in tl.range(first, blocks * n_tiles, programs):
        block, column = _place(tile, blocks, n_tiles, SWAP)
        column *= BLOCK_N
        gate_row = tl.load(block_experts + block) * (2 * WIDTH) + column
        slot = block * BLOCK_M + tl.arange(0, BLOCK_M)
        token = tl.maximum(tl.load(slots + slot), 0) // TOP_K  # slots of no choice take token 0: nobody reads them
        x_row = x + token.to(tl.int64)[:, None] * HIDDEN
        gate = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, HIDDEN, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)[None, :]
            tokens = tl.load(x_row + ks) if even else tl.load(x_row + ks, mask=ks < HIDDEN, other=0.0)
            gate = _multiply_add(tokens, gate_up.load([gate_row, k]), gate, SWAP, UPCAST)
            up = _multiply_add(tokens, gate_up.load([gate_row + WIDTH, k]), up, SWAP, UPCAST)
        _store_act(act, gate, up, slot, column, WIDTH, BLOCK_N, SWAP)


@triton.jit  # type: ignore[untyped-decorator]
def _down_kernel(  # type: ignore[no-untyped-def]
    act, shared_act, down, parts, slots, block_experts, num_blocks, live_rows, shared_at, shared_rows,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    SHARED: tl.constexpr, SHARED_M: tl.constexpr, SHARED_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n_tiles: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    programs = tl.num_programs(0)
    first = tl.program_id(0)
    if SHARED:
        live = tl.load(live_rows)
        row_blocks = tl.cdiv(live, SHARED_M)
        shared_tiles = SHARED * n_tiles * row_blocks
        for tile in tl.range(tl.program_id(0), shared_tiles, programs):
            expert, column, row_block = _shared_place(tile, row_blocks, n_tiles)
            column *= BLOCK_N
            down_row = (EXPERTS - SHARED + expert) * HIDDEN + column
            act_row = shared_at + expert * shared_rows + row_block * SHARED_M
            acc = tl.zeros((BLOCK_N, SHARED_M) if SWAP else (SHARED_M, BLOCK_N), tl.float32)
            for k in tl.range(0, WIDTH, BLOCK_K, num_stages=SHARED_STAGES):
                acc = _multiply_add(shared_act.load([act_row, k]), down.load([down_row, k]), acc, SWAP, UPCAST)
            row = (row_block * SHARED_M + tl.arange(0, SHARED_M))[:, None]
            choice = tl.where(row < live, row * TOP_K + (TOP_K - SHARED) + expert, -1)
            _store_parts(parts, acc, choice, column, HIDDEN, BLOCK_N, SWAP)
        first = _behind(shared_tiles, programs)
    blocks = tl.load(num_blocks)
    for tile in tl.range(first, blocks * n_tiles, programs):
        block, column = _place(tile, blocks, n_tiles, SWAP)
        column *= BLOCK_N
        down_row = tl.load(block_experts + block) * HIDDEN + column
        choice = tl.load(slots + block * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, WIDTH, BLOCK_K):
            acc = _multiply_add(act.load([block * BLOCK_M, k]), down.load([down_row, k]), acc, SWAP, UPCAST)
        _store_parts(parts, acc, choice, column, HIDDEN, BLOCK_N, SWAP)


@triton.jit  # type: ignore[untyped-decorator]
def _store_parts(parts, acc, choice, column, HIDDEN: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The parts of choices [slots, 1], but for those below 0."""
    part = acc.to(parts.dtype.element_ty)
    if SWAP:
        part = tl.trans(part)
    columns = column + tl.arange(0, BLOCK_N)[None, :]
    tl.store(parts + choice.to(tl.int64) * HIDDEN + columns, part, mask=(choice >= 0) & (columns < HIDDEN))
