"""Root mean square normalisation (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise `x` [..., dim] and scale it by `weight` [dim]; computed in float32, returned in x's dtype."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` into `residual` [..., dim], in place; return the sum normalised, and the sum."""
    residual.add_(x)
    return rms_norm(residual, weight, eps), residual
