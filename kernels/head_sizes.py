"""Which attention heads the GPU kernels can run. Without torch, so that it can be asked before anything is started."""

from __future__ import annotations

SMALLEST = 16


def runs_on_gpu(dim: int, value_dim: int) -> bool:
    """Whether keys of `dim` numbers, of which MLA takes the first `value_dim` as values, are cut as kernels need it.

    Tiles have powers of two: `value_dim`, and the rest of a key if there is one, must be some of at least 16.
    """
    parts = [value_dim, dim - value_dim] if dim > value_dim else [dim]
    return all(part >= SMALLEST and part & (part - 1) == 0 for part in parts)
