"""Root mean square normalisation (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

NUM_WARPS = 4


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise `x` [..., dim] and scale it by `weight` [dim]; computed in float32, returned in x's dtype.

    On a GPU only the last dimension has to be contiguous, and rows to be evenly apart.
    """
    if not x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    return triton_rms_norm(x, None, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` into `residual` [..., dim], in place; return the sum normalised, and the sum."""
    if not x.is_cuda:
        residual.add_(x)
        return rms_norm(residual, weight, eps), residual
    return triton_rms_norm(x, residual, weight, eps), residual


def triton_rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The kernel behind both: `residual`, where there is one, becomes residual + x, and that is normalised."""
    rows = x.view(-1, x.shape[-1]) if x.is_contiguous() else x.flatten(0, -2)
    normed = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    dim = rows.shape[1]
    if len(rows):
        _rms_norm[(len(rows),)](
            rows,
            rows if residual is None else residual,
            weight,
            normed,
            rows.stride(0),
            eps,
            dim=dim,
            adds=residual is not None,
            block=triton.next_power_of_2(dim),
            num_warps=8 if dim > 2048 else NUM_WARPS,
        )
    return normed.view(x.shape)


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    row_stride: tl.tensor,
    eps: tl.tensor,
    dim: tl.constexpr,
    adds: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    within = columns < dim
    values = tl.load(x + row * row_stride + columns, mask=within, other=0.0)
    if adds:
        # Rounded to the residual's dtype first: the sum that is normalised is the sum that is kept.
        values = (
            values.to(tl.float32) + tl.load(residual + row * dim + columns, mask=within, other=0.0).to(tl.float32)
        ).to(values.dtype)
        tl.store(residual + row * dim + columns, values, mask=within)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / dim + eps)
    scaled = wide * scale * tl.load(weight + columns, mask=within, other=0.0).to(tl.float32)
    tl.store(normed + row * dim + columns, scaled.to(normed.dtype.element_ty), mask=within)
