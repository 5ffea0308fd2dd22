"""The routed experts of a layer on a GPU: two grouped GEMMs over the blocks that tokens chose, and a sum per token.

    schedule   which block of slots holds which choices of which expert          kernels.moe_schedule
    gate_up    act[slot] = silu(gate(x)) * up(x) of the slot's token             persistent grouped GEMM
    down       parts[choice] = down(act)                                         persistent grouped GEMM
    combine    out[token] = sum over its choices, in order, of weight * part     one program a row and strip

Grids are fixed by the capacity, the number of rows of the tensors, and live counts are read on the device, so one
CUDA graph serves any number of live rows. Every sum runs over K in tiles of a fixed size, in float32, so a row's bits
do not depend on the other rows at one capacity.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from splitserve.kernels.launch import INTERPRETING, num_sms
from splitserve.kernels.moe_gathered import gathered_gate_up
from splitserve.kernels.moe_schedule import BlockSchedule, block_schedule
from splitserve.kernels.moe_tiles import ExpertTiles, GemmTile, expert_tiles
from splitserve.kernels.rms_norm import Terms
from splitserve.kernels.silu_and_mul import silu_and_mul

GATHER_HIDDEN = 1024  # narrower ones were not tried


def routed_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    live_rows: torch.Tensor,
    *,
    first_expert: int = 0,
    tiles: ExpertTiles | None = None,
    sms: int | None = None,
) -> torch.Tensor:
    """Sum over a token's choices of weight * down(silu(gate(x)) * up(x)): [rows, hidden] of x's dtype.

    `x` [rows, hidden] bfloat16; `weights` [rows, top_k] float32 and `chosen` [rows, top_k] int64 or int32 from
    `kernels.moe_routing.route`; `gate_up` [experts, 2 * width, hidden], gate rows first, and `down` [experts, hidden,
    width] of x's dtype; `live_rows` [1] int32. Rows from `live_rows` on load nothing and come out as 0. A choice's
    part is rounded to x's dtype, and parts are added in float32 in the order of choices. The experts here are
    `first_expert` and those after it; choices of others add nothing.

    `sms` limits the SMs that the persistent kernels take, None for all. Raises ValueError for tensors that do not fit
    together, are not contiguous, or have an odd width in bytes (rows must be multiples of 16 bytes).
    """
    terms = routed_terms(x, weights, chosen, gate_up, down, live_rows, first_expert=first_expert, tiles=tiles, sms=sms)
    pdl = not INTERPRETING
    return _combine(_by_choice(terms), weights, chosen, live_rows, first_expert, gate_up.shape[0], pdl)


def routed_terms(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    live_rows: torch.Tensor,
    *,
    first_expert: int = 0,
    tiles: ExpertTiles | None = None,
    sms: int | None = None,
) -> Terms:
    """The same as the terms of that sum, for whoever reads it to take. Terms of other ranks' experts hold anything."""
    _check(x, weights, chosen, gate_up, down, live_rows)
    rows, top_k = chosen.shape
    tiles = tiles or expert_tiles(rows, top_k, gate_up.shape[0])
    tiles = replace(tiles, pdl=tiles.pdl and not INTERPRETING)
    sms = sms or num_sms(x.device)
    schedule = block_schedule(
        chosen, live_rows, gate_up.shape[0], tiles.block_m, first_expert=first_expert, pdl=tiles.pdl
    )
    act = _gate_up(x, gate_up, schedule, chosen.shape[1], tiles, sms)
    parts = _down(act, down, schedule, chosen.numel(), tiles, sms)
    return Terms(parts.view(*chosen.shape, -1).transpose(0, 1), weights, live_rows)


def _by_choice(terms: Terms) -> torch.Tensor:
    """[rows * top_k, hidden], as the down GEMM left them."""
    return terms.values.transpose(0, 1).flatten(0, 1)


def routed_experts_reference(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    live_rows: int,
    first_expert: int = 0,
) -> torch.Tensor:
    """The same in torch, one expert after the other."""
    parts = x.new_zeros(*chosen.shape, x.shape[1])
    for expert in range(gate_up.shape[0]):
        tokens, places = torch.where(chosen[:live_rows] == first_expert + expert)
        if len(tokens):
            parts[tokens, places] = silu_and_mul(x[tokens] @ gate_up[expert].T) @ down[expert].T
    total = torch.zeros_like(x, dtype=torch.float32)
    for place in range(chosen.shape[1]):
        total += parts[:, place].float() * weights[:, place, None]
    total[live_rows:] = 0
    return total.to(x.dtype)


def _check(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    live_rows: torch.Tensor,
) -> None:
    hidden, width = x.shape[1], down.shape[2]
    fits = (
        gate_up.shape[1:] == (2 * width, hidden)
        and down.shape == (gate_up.shape[0], hidden, width)
        and weights.shape == chosen.shape
        and chosen.shape[0] == x.shape[0]
        and live_rows.shape == (1,)
    )
    if not fits:
        shapes = [tuple(tensor.shape) for tensor in (x, weights, chosen, gate_up, down, live_rows)]
        raise ValueError(f"x, weights, chosen, gate_up, down and live_rows do not fit together: {shapes}")
    dtypes = (weights.dtype, live_rows.dtype) == (torch.float32, torch.int32)
    if not dtypes or not x.dtype == gate_up.dtype == down.dtype or chosen.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "x, gate_up and down must share a dtype; weights float32, chosen int64 or int32, live_rows int32"
        )
    if not all(tensor.is_contiguous() for tensor in (x, weights, chosen, gate_up, down)):
        raise ValueError("x, weights, chosen, gate_up and down must be contiguous")
    if hidden * x.itemsize % 16 or width * x.itemsize % 16:
        raise ValueError(f"rows of {hidden} and {width} elements are not multiples of 16 bytes")


def _tiled(matrix: torch.Tensor, block_rows: int, tile: GemmTile) -> TensorDescriptor:
    """For loads of [block_rows, block_k] tiles of `matrix` [..., k], seen as [rows, k]; 0 outside it."""
    return TensorDescriptor.from_tensor(matrix.flatten(0, -2), [block_rows, tile.block_k])


def _options(x: torch.Tensor, tiles: ExpertTiles, tile: GemmTile) -> dict[str, Any]:
    """What both GEMMs take. The interpreter's bfloat16 `tl.dot` returns garbage: there it gets float32."""
    return {
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


def _gate_up(
    x: torch.Tensor, gate_up: torch.Tensor, schedule: BlockSchedule, top_k: int, tiles: ExpertTiles, sms: int
) -> torch.Tensor:
    """act [max_blocks * block_m, width]; slots of no choice and blocks that are not live hold anything."""
    tile, hidden, width = tiles.gate_up, x.shape[1], gate_up.shape[1] // 2
    if tiles.gather and hidden >= GATHER_HIDDEN:
        return gathered_gate_up(
            x, gate_up, schedule, top_k, sms * tile.programs_per_sm,
            block_n=tile.block_n, block_k=tile.block_k, warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
    act = x.new_empty(schedule.slots.numel(), width)
    grid = (min(sms * tile.programs_per_sm, schedule.max_blocks * triton.cdiv(width, tile.block_n)),)
    _gate_up_kernel[grid](
        x, _tiled(gate_up, tile.block_n, tile), act, schedule.slots, schedule.experts, schedule.num_blocks,
        HIDDEN=hidden, WIDTH=width, TOP_K=top_k, **_options(x, tiles, tile),
    )  # fmt: skip
    return act


def _down(
    act: torch.Tensor, down: torch.Tensor, schedule: BlockSchedule, num_choices: int, tiles: ExpertTiles, sms: int
) -> torch.Tensor:
    """parts [num_choices, hidden]; choices without a slot hold anything."""
    tile, (_, hidden, width) = tiles.down, down.shape
    parts = act.new_empty(num_choices, hidden)
    grid = (min(sms * tile.programs_per_sm, schedule.max_blocks * triton.cdiv(hidden, tile.block_n)),)
    _down_kernel[grid](
        _tiled(act, tiles.block_m, tile), _tiled(down, tile.block_n, tile), parts,
        schedule.slots, schedule.experts, schedule.num_blocks,
        HIDDEN=hidden, WIDTH=width, **_options(act, tiles, tile),
    )  # fmt: skip
    return parts


def _combine(
    parts: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    live_rows: torch.Tensor,
    first_expert: int,
    num_experts: int,
    pdl: bool,
) -> torch.Tensor:
    (rows, top_k), hidden = chosen.shape, parts.shape[1]
    out = parts.new_empty(rows, hidden)
    strip = min(1024, triton.next_power_of_2(hidden))
    _combine_kernel[(rows, triton.cdiv(hidden, strip))](
        parts, weights, chosen, live_rows, out,
        HIDDEN=hidden, TOP_K=top_k, FIRST=first_expert, EXPERTS=num_experts, STRIP=strip,
        PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip
    return out


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


@triton.jit  # type: ignore[untyped-decorator]
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x, gate_up, act, slots, block_experts, num_blocks,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n_tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    even: tl.constexpr = HIDDEN % BLOCK_K == 0
    blocks = tl.load(num_blocks)
    for tile in tl.range(tl.program_id(0), blocks * n_tiles, tl.num_programs(0)):
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
        gated = (gate / (1.0 + tl.exp(-gate)) * up).to(act.dtype.element_ty)
        if SWAP:
            gated = tl.trans(gated)
        columns = column + tl.arange(0, BLOCK_N)[None, :]
        tl.store(act + slot.to(tl.int64)[:, None] * WIDTH + columns, gated, mask=columns < WIDTH)


@triton.jit  # type: ignore[untyped-decorator]
def _down_kernel(  # type: ignore[no-untyped-def]
    act, down, parts, slots, block_experts, num_blocks,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n_tiles: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    blocks = tl.load(num_blocks)
    for tile in tl.range(tl.program_id(0), blocks * n_tiles, tl.num_programs(0)):
        block, column = _place(tile, blocks, n_tiles, SWAP)
        column *= BLOCK_N
        down_row = tl.load(block_experts + block) * HIDDEN + column
        choice = tl.load(slots + block * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, WIDTH, BLOCK_K):
            acc = _multiply_add(act.load([block * BLOCK_M, k]), down.load([down_row, k]), acc, SWAP, UPCAST)
        part = acc.to(parts.dtype.element_ty)
        if SWAP:
            part = tl.trans(part)
        columns = column + tl.arange(0, BLOCK_N)[None, :]
        tl.store(parts + choice.to(tl.int64) * HIDDEN + columns, part, mask=(choice >= 0) & (columns < HIDDEN))


@triton.jit  # type: ignore[untyped-decorator]
def _combine_kernel(  # type: ignore[no-untyped-def]
    parts, weights, chosen, live_rows, out,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, FIRST: tl.constexpr, EXPERTS: tl.constexpr, STRIP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    columns = tl.program_id(1) * STRIP + tl.arange(0, STRIP)
    total = tl.zeros((STRIP,), tl.float32)
    if row < tl.load(live_rows):
        for place in tl.static_range(TOP_K):
            choice = row * TOP_K + place
            expert = tl.load(chosen + choice).to(tl.int32) - FIRST
            here = (expert >= 0) & (expert < EXPERTS)
            part = tl.load(parts + choice.to(tl.int64) * HIDDEN + columns, mask=here & (columns < HIDDEN), other=0.0)
            total += part.to(tl.float32) * tl.load(weights + choice)
    tl.store(out + row.to(tl.int64) * HIDDEN + columns, total.to(out.dtype.element_ty), mask=columns < HIDDEN)
