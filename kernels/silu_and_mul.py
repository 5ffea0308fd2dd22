"""Gate of a SwiGLU MLP (arXiv 2002.05202): silu(gate) * up."""

from __future__ import annotations

import torch


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Gate `x` [..., 2 * dim], whose first half is the gate and second half the value; returns [..., dim].

    silu(g) = g / (1 + exp(-g)), step by step and computed in float32: on a CPU torch's own silu rounds an element
    differently at the end of a vectorised run, so a token's bits would depend on how many tokens stand before it.
    """
    gate, up = x.float().chunk(2, dim=-1)
    return gate.div(gate.neg().exp_().add_(1)).mul_(up).to(x.dtype)
