"""Rotary position embedding (arXiv 2104.09864) in the NeoX form: dimension i turns with dimension i + dim / 2."""

from __future__ import annotations

import torch


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the heads `x` [tokens, heads, dim] by their tokens' angles; returns a new tensor of x's shape and dtype.

    `cos` and `sin` [tokens, 1, dim] are float32 rows of `models.rope.RopeTable`, gathered once per step; the first
    half of `sin` is negative, so that the rotated half needs no sign of its own.
    """
    rotated = x.roll(x.shape[-1] // 2, dims=-1)
    # Separate products and sum: a fused multiply-add would round some elements of a row otherwise than others.
    return (x * cos).add_(rotated * sin).to(x.dtype)
