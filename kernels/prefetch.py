"""Asks for memory ahead of its use, in what time a kernel has before the one in front of it ends."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch_l2(pointers, size):  # type: ignore[no-untyped-def]
    """Bring `size` bytes (a multiple of 16) from each of `pointers` on into L2. Hopper only, not interpreted."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [pointers, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_early(pointers):  # type: ignore[no-untyped-def]
    """Load what an earlier kernel wrote, in front of `gdc_wait`. L1 may hold what was there before, until that wait."""
    return tl.load(pointers, cache_modifier=".cg")
