"""Whether a rank's processor keeps the rows of a product apart, as same tokens for the same request need it.

MKL does not promise that.
"""

from __future__ import annotations

import logging

import torch

from splitserve.kernels.paged_attention import MIN_GEMM_COLUMNS, MIN_GEMM_ROWS, TILE

log = logging.getLogger(__name__)

MOST_ROWS = 8 * TILE  # a tile of queries by 8 heads that share keys
# Where rows do not stay apart, 8 and 32 are the odd ones.
ROWS = (MIN_GEMM_ROWS, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)


def check_cpu(head_dim: int) -> None:
    """Warn where rows of attention's products over heads of `head_dim` have other bits beside other rows."""
    if not rows_are_independent(head_dim):
        log.warning(
            "on this processor a float32 row's bits depend on its neighbours, so that the same request may get other "
            "tokens beside other requests; on Intel's and AMD's with AVX2 they do not"
        )


def rows_are_independent(head_dim: int) -> bool:
    """Whether rows of queries x keys and of weights x values are the same to the bit, however many there are."""
    dice = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(1, rows, head_dim, generator=dice) for rows in (MOST_ROWS, TILE))
    weights = torch.randn(1, MOST_ROWS, TILE, generator=dice)
    values = torch.randn(1, TILE, max(head_dim, MIN_GEMM_COLUMNS), generator=dice)
    for rows, columns in ((queries, keys.transpose(1, 2)), (weights, values)):
        whole = torch.bmm(rows, columns)
        if not all(torch.equal(torch.bmm(rows[:, :few], columns), whole[:, :few]) for few in ROWS):
            return False
    return True
