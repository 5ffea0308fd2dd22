"""Root mean square normalisation (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from splitserve.kernels.launch import INTERPRETING

NUM_WARPS = 4


@dataclass(frozen=True, eq=False)
class Terms:
    """A result [rows, dim] as the sum of its terms, which whoever reads it adds in their order, in float32.

    `values` [terms, rows, dim]: any strides but the last. With `weights` [rows, terms] float32 each term is multiplied
    by its row's. With `live` [1] int32, rows from there on may hold anything, and come to 0.
    """

    values: torch.Tensor
    weights: torch.Tensor | None = None
    live: torch.Tensor | None = None

    def sum(self, dtype: torch.dtype) -> torch.Tensor:
        """[rows, dim], rounded once."""
        total = torch.zeros(self.values.shape[1:], dtype=torch.float32, device=self.values.device)
        for place, term in enumerate(self.values.float()):
            total += term if self.weights is None else term * self.weights[:, place, None]
        if self.live is not None:
            total[torch.arange(len(total), device=total.device) >= self.live] = 0
        return total.to(dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise `x` [..., dim] and scale it by `weight` [dim]; computed in float32, returned in x's dtype.

    On a GPU only the last dimension has to be contiguous, and rows to be evenly apart.
    """
    if not x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    return triton_rms_norm(x, None, weight, eps)


def add_rms_norm(
    x: torch.Tensor | Terms, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` [..., dim] into `residual`, in place; return the sum normalised, and the sum.

    The sum of terms is rounded to the residual's dtype before it is added, as a tensor of it were.
    """
    if not residual.is_cuda:
        residual.add_(x.sum(residual.dtype) if isinstance(x, Terms) else x)
        return rms_norm(residual, weight, eps), residual
    return triton_rms_norm(x, residual, weight, eps), residual


def triton_rms_norm(
    x: torch.Tensor | Terms, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The kernel behind both: `residual`, where there is one, becomes residual + x, and that is normalised."""
    terms, like = (x, residual) if isinstance(x, Terms) else (Terms(_rows(x).unsqueeze(0)), x)
    if like is None:
        raise ValueError("terms are normalised with the residual that they are added to")
    count, rows, dim = terms.values.shape
    normed = torch.empty(rows, dim, dtype=like.dtype, device=like.device)
    if rows:
        _rms_norm[(rows,)](
            terms.values, terms.weights, terms.live, residual, weight, normed,
            terms.values.stride(0), terms.values.stride(1), eps,
            TERMS=count, DIM=dim, BLOCK=triton.next_power_of_2(dim),
            PDL=not INTERPRETING, launch_pdl=not INTERPRETING, num_warps=8 if dim > 2048 else NUM_WARPS,
        )  # fmt: skip
    return normed.view(like.shape)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, x.shape[-1]) if x.is_contiguous() else x.flatten(0, -2)


@triton.jit  # type: ignore[untyped-decorator]
def load_terms(  # type: ignore[no-untyped-def]
    values, weights, row, columns, mask, term_stride, row_stride, TERMS: tl.constexpr
):
    """The sum of a row's terms in float32."""
    total = tl.zeros(columns.shape, tl.float32)
    for place in tl.static_range(TERMS):
        term = tl.load(values + place * term_stride + row * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if weights is None:
            total += term
        else:
            total += term * tl.load(weights + row * TERMS + place)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm(  # type: ignore[no-untyped-def]
    values, weights, live, residual, weight, normed, term_stride, row_stride, eps,
    TERMS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    within = columns < DIM
    gain = tl.load(weight + columns, mask=within, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    counts = within
    if live is not None:
        counts = within & (row < tl.load(live))
    wide = load_terms(values, weights, row, columns, counts, term_stride, row_stride, TERMS)
    if residual is not None:
        # Rounded before and after: a sum of terms is what a tensor of it were, and the sum normalised is the one kept.
        kept = tl.load(residual + row * DIM + columns, mask=within, other=0.0)
        total = (wide.to(kept.dtype).to(tl.float32) + kept.to(tl.float32)).to(kept.dtype)
        tl.store(residual + row * DIM + columns, total, mask=within)
        wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / DIM + eps)
    tl.store(normed + row * DIM + columns, (wide * scale * gain).to(normed.dtype.element_ty), mask=within)
