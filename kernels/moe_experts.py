"""The routed experts of a layer on a GPU: two grouped GEMMs over the blocks that tokens chose, and a sum per token.

    schedule   which block of slots holds which choices of which expert          kernels.moe_schedule
    gate_up    act[slot] = silu(gate(x)) * up(x) of the slot's token             persistent grouped GEMM
    down       parts[choice] = down(act)                                         persistent grouped GEMM
    combine    out[token] = sum over its choices, in order, of weight * part     one program a row and strip

Shared experts are the last choices of every token. They need no schedule: both GEMMs begin with their tiles, which take
more tokens at a time than a routed expert has, because each such tile reads the weights again.

Grids are fixed by the capacity, the number of rows of the tensors, and live counts are read on the device, so one
CUDA graph serves any number of live rows. Every sum runs over K in tiles of a fixed size, in float32, so a row's bits
do not depend on the other rows at one capacity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from splitserve.kernels.launch import INTERPRETING, num_sms
from splitserve.kernels.moe_gathered import gathered_gate_up
from splitserve.kernels.moe_gemms import Choices, grouped_down, grouped_gate_up
from splitserve.kernels.moe_schedule import block_schedule
from splitserve.kernels.moe_tiles import ExpertTiles, expert_tiles
from splitserve.kernels.rms_norm import Terms
from splitserve.kernels.silu_and_mul import silu_and_mul

GATHER_HIDDEN = 1024  # narrower ones were not tried


@dataclass(frozen=True, eq=False)
class Experts:
    """A layer's experts on this rank, number `first` and those behind it; the last `shared` of them are every token's.

    `gate_up` [experts, 2 * width, hidden], gate rows first, and `down` [experts, hidden, width].
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    first: int = 0
    shared: int = 0

    def __len__(self) -> int:
        return len(self.down)


def routed_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    experts: Experts,
    live_rows: torch.Tensor,
    *,
    tiles: ExpertTiles | None = None,
    sms: int | None = None,
) -> torch.Tensor:
    """Sum over a token's choices of weight * down(silu(gate(x)) * up(x)): [rows, hidden] of x's dtype.

    `x` [rows, hidden] bfloat16; `weights` [rows, top_k] float32 and `chosen` [rows, top_k] int64 or int32 from
    `kernels.moe_routing.route`; `live_rows` [1] int32. Rows from `live_rows` on load nothing and come out as 0. A
    choice's part is rounded to x's dtype, and parts are added in float32 in the order of choices. Choices of other
    ranks' experts add nothing. The last `experts.shared` choices of each token are those experts, in order.

    `sms` limits the SMs that the persistent kernels take, None for all. Raises ValueError for tensors that do not fit
    together, are not contiguous, or have an odd width in bytes (rows must be multiples of 16 bytes).
    """
    terms = routed_terms(x, weights, chosen, experts, live_rows, tiles=tiles, sms=sms)
    return _combine(_by_choice(terms), weights, chosen, live_rows, experts, pdl=not INTERPRETING)


def routed_terms(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    experts: Experts,
    live_rows: torch.Tensor,
    *,
    tiles: ExpertTiles | None = None,
    sms: int | None = None,
) -> Terms:
    """The same as the terms of that sum, for whoever reads it to take. Terms of other ranks' experts hold anything."""
    _check(x, weights, chosen, experts, live_rows)
    rows, top_k = chosen.shape
    tiles = tiles or expert_tiles(rows, top_k, len(experts))
    tiles = replace(tiles, pdl=tiles.pdl and not INTERPRETING)
    sms, choices = sms or num_sms(x.device), Choices(chosen, live_rows, experts.shared if tiles.shared_m else 0)
    scheduled = len(experts) - choices.shared
    schedule = block_schedule(chosen, live_rows, scheduled, tiles.block_m, first_expert=experts.first, pdl=tiles.pdl)
    if tiles.gather and x.shape[1] >= GATHER_HIDDEN:
        act = gathered_gate_up(x, experts.gate_up, schedule, top_k, tiles.gate_up, sms)
    else:
        act = grouped_gate_up(x, experts.gate_up, schedule, choices, tiles, sms)
    parts = grouped_down(act, experts.down, schedule, choices, tiles, sms)
    return Terms(parts.view(*chosen.shape, -1).transpose(0, 1), weights, live_rows)


def _by_choice(terms: Terms) -> torch.Tensor:
    """[rows * top_k, hidden], as the down GEMM left them."""
    return terms.values.transpose(0, 1).flatten(0, 1)


def routed_experts_reference(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, experts: Experts, live_rows: int
) -> torch.Tensor:
    """The same in torch, one expert after the other."""
    parts = x.new_zeros(*chosen.shape, x.shape[1])
    for index in range(len(experts)):
        tokens, places = torch.where(chosen[:live_rows] == experts.first + index)
        if len(tokens):
            parts[tokens, places] = silu_and_mul(x[tokens] @ experts.gate_up[index].T) @ experts.down[index].T
    total = torch.zeros_like(x, dtype=torch.float32)
    for place in range(chosen.shape[1]):
        total += parts[:, place].float() * weights[:, place, None]
    total[live_rows:] = 0
    return total.to(x.dtype)


def _check(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, experts: Experts, live_rows: torch.Tensor
) -> None:
    gate_up, down = experts.gate_up, experts.down
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


def _combine(
    parts: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    live_rows: torch.Tensor,
    experts: Experts,
    pdl: bool,
) -> torch.Tensor:
    (rows, top_k), hidden = chosen.shape, parts.shape[1]
    out = parts.new_empty(rows, hidden)
    strip = min(1024, triton.next_power_of_2(hidden))
    _combine_kernel[(rows, triton.cdiv(hidden, strip))](
        parts, weights, chosen, live_rows, out,
        HIDDEN=hidden, TOP_K=top_k, FIRST=experts.first, EXPERTS=len(experts), STRIP=strip,
        PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip
    return out


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
