"""Gate of a SwiGLU MLP (arXiv 2002.05202): silu(gate) * up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Gate `x` [..., 2 * dim], whose first half is the gate and second half the value; returns [..., dim].

    silu(g) = g / (1 + exp(-g)), step by step and computed in float32: on a CPU torch's own silu rounds an element
    differently at the end of a vectorised run, so a token's bits would depend on how many tokens stand before it.
    """
    if x.is_cuda:
        return triton_silu_and_mul(x)
    gate, up = x.float().chunk(2, dim=-1)
    return gate.div(gate.neg().exp_().add_(1)).mul_(up).to(x.dtype)


def triton_silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """The same as one kernel, for contiguous `x`."""
    dim = x.shape[-1] // 2
    gated = x.new_empty(*x.shape[:-1], dim)
    rows = gated.numel() // dim
    if rows:
        _silu_and_mul[(rows, triton.cdiv(dim, BLOCK))](x, gated, dim=dim, block=BLOCK)
    return gated


@triton.jit  # type: ignore[untyped-decorator]
def _silu_and_mul(x: tl.tensor, gated: tl.tensor, dim: tl.constexpr, block: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    within = columns < dim
    gate = tl.load(x + row * 2 * dim + columns, mask=within, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * dim + dim + columns, mask=within, other=0.0).to(tl.float32)
    tl.store(gated + row * dim + columns, (gate / (1.0 + tl.exp(-gate)) * up).to(gated.dtype.element_ty), mask=within)
