"""Scattered changes of single words: many small updates of device state in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 256


def update_words(words: torch.Tensor, changes: torch.Tensor) -> None:
    """Set word `changes[0, i]` of `words` [n] to `changes[1, i]`; all int32. No word may be named twice."""
    count = changes.shape[1]
    if count:
        _update_kernel[(triton.cdiv(count, BLOCK),)](words, changes, changes.stride(0), count, BLOCK=BLOCK)


@triton.jit(do_not_specialize=["stride", "count"])  # type: ignore[untyped-decorator]
def _update_kernel(words, changes, stride, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    word = tl.load(changes + index, mask=inside, other=0)
    tl.store(words + word, tl.load(changes + stride + index, mask=inside, other=0), mask=inside)
