from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from splitserve.prefill_worker.scheduler import plan_chunks


def test_short_prompts_are_packed_and_the_last_one_is_cut() -> None:
    assert plan_chunks([10, 20, 100, 5], budget=64) == [10, 20, 34, 0]


@given(st.lists(st.integers(1, 1000), max_size=20), st.integers(1, 512))
def test_the_budget_is_spent_in_order(pending: list[int], budget: int) -> None:
    chunks = plan_chunks(pending, budget)
    assert sum(chunks) == min(budget, sum(pending))
    cut = next((i for i, (chunk, left) in enumerate(zip(chunks, pending, strict=True)) if chunk < left), len(chunks))
    assert not any(chunks[cut + 1 :])
