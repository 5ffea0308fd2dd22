"""Which prompt tokens to compute next. A pure function."""

from __future__ import annotations

from collections.abc import Sequence


def plan_chunks(pending_tokens: Sequence[int], budget: int) -> list[int]:
    """Tokens to compute of each prompt in one step, oldest prompt first.

    `pending_tokens`: what is left of each prompt, in order of arrival. Every prompt takes what the ones before it
    leave of `budget` tokens, so that a long prompt is cut into chunks and short ones are packed together.
    """
    chunks = []
    for pending in pending_tokens:
        chunk = min(pending, budget)
        budget -= chunk
        chunks.append(chunk)
    return chunks
