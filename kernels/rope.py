"""Rotary position embedding (arXiv 2104.09864).

In the NeoX form dimension i turns with dimension i + dim / 2, in the interleaved form 2i with 2i + 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the heads `x` [tokens, heads, dim] by their tokens' angles; returns a new tensor of x's shape and dtype.

    `cos` and `sin` [tokens, 1, dim] are float32 rows of `models.rope.RopeTable`, gathered once per step; the first
    half of `sin` is negative, so that the rotated half needs no sign of its own.
    """
    if x.is_cuda:
        return triton_rope(x, cos, sin, interleaved=False)
    rotated = x.roll(x.shape[-1] // 2, dims=-1)
    # Separate products and sum: a fused multiply-add would round some elements of a row otherwise than others.
    return (x * cos).add_(rotated * sin).to(x.dtype)


def apply_rope_interleaved(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Like `apply_rope` for heads in the interleaved form, which come out in the NeoX form; into `out` if given, which
    on a GPU may be `x` itself.

    Queries and keys alike, so that their products are what they were.
    """
    if x.is_cuda:
        return triton_rope(x, cos, sin, interleaved=True, out=out)
    turned = apply_rope(torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1), cos, sin)
    return turned if out is None else out.copy_(turned)


def triton_rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The kernel behind both: `x` and `out` may be part of wider rows, their heads of wider heads."""
    tokens, heads, dim = x.shape
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if tokens:
        _rope[(tokens,)](
            x,
            cos,
            sin,
            turned,
            x.stride(0),
            x.stride(1),
            turned.stride(0),
            turned.stride(1),
            heads,
            half=dim // 2,
            interleaved=interleaved,
            block_heads=triton.next_power_of_2(heads),
            block_half=triton.next_power_of_2(dim // 2),
        )
    return turned


@triton.jit  # type: ignore[untyped-decorator]
def _rope(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    turned: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    turned_token_stride: tl.tensor,
    turned_head_stride: tl.tensor,
    heads: tl.tensor,
    half: tl.constexpr,
    interleaved: tl.constexpr,
    block_heads: tl.constexpr,
    block_half: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, block_heads)[:, None], tl.arange(0, block_half)[None, :]
    within = (head < heads) & (pair < half)
    start = x + token * token_stride + head * head_stride
    if interleaved:
        # Whole rows first, then apart: every other number alone would be read as slowly as both.
        both = tl.arange(0, 2 * block_half)[None, :]
        row = tl.load(start + both, mask=(head < heads) & (both < 2 * half), other=0.0)
        low, high = tl.split(tl.reshape(row, [block_heads, block_half, 2]))
    else:
        low = tl.load(start + pair, mask=within, other=0.0)
        high = tl.load(start + half + pair, mask=within, other=0.0)
    low, high = low.to(tl.float32), high.to(tl.float32)
    angle = token * 2 * half + half + pair  # the second half: there the sine has its own sign
    cosine, sine = tl.load(cos + angle, mask=pair < half), tl.load(sin + angle, mask=pair < half)
    tl.debug_barrier()  # `turned` may be `x`: no thread stores before all have loaded
    target = turned + token * turned_token_stride + head * turned_head_stride + pair
    tl.store(target, (low * cosine - high * sine).to(turned.dtype.element_ty), mask=within)
    tl.store(target + half, (high * cosine + low * sine).to(turned.dtype.element_ty), mask=within)
