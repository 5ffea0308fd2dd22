from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from splitserve.cluster.errors import Overloaded
from splitserve.router.admission import MAX_RETRY_S, MIN_RETRY_S, Admission
from splitserve.router.policy import EngineView, Placement, Policy, place


def views(role: str, loads: list[int]) -> list[EngineView]:
    return [EngineView(f"{role}/{index}/0", role, load) for index, load in enumerate(loads)]  # type: ignore[arg-type]


def test_round_robin_takes_turns_whatever_the_load() -> None:
    prefills, decodes = views("prefill", [9, 0]), views("decode", [0, 9, 0])
    pairs = [place(prefills, decodes, "round_robin", counter) for counter in range(6)]
    assert Counter(prefill for prefill, _ in pairs) == {"prefill/0/0": 3, "prefill/1/0": 3}
    assert Counter(decode for _, decode in pairs) == {f"decode/{index}/0": 2 for index in range(3)}


def test_least_load_takes_the_least_loaded_and_spreads_ties() -> None:
    prefills, decodes = views("prefill", [3, 1]), views("decode", [2, 1, 1])
    chosen = [place(prefills, decodes, "least_load", counter) for counter in range(30)]
    assert {prefill for prefill, _ in chosen} == {"prefill/1/0"}
    ties = Counter(decode for _, decode in chosen)
    assert set(ties) == {"decode/1/0", "decode/2/0"}
    assert min(ties.values()) >= 10


def test_of_equally_loaded_prefill_engines_a_linked_one_comes_first() -> None:
    prefills, decodes, linked = views("prefill", [1, 1, 1]), views("decode", [0, 0]), set[Placement]()
    for counter in range(30):
        linked.add(place(prefills, decodes, "least_load", counter, linked))
    assert len(linked) == 2, "a link for each decode engine, none for every pair"
    prefill, _ = place(
        views("prefill", [2, 2, 1]), decodes, "least_load", 0, linked={Placement("prefill/0/0", "decode/0/0")}
    )
    assert prefill == "prefill/2/0"


@pytest.mark.parametrize("policy", ["round_robin", "least_load"])
def test_broken_pairs_are_chosen_where_there_are_no_others(policy: Policy) -> None:
    prefills, decodes = views("prefill", [0, 0]), views("decode", [0, 1])
    pairs = [Placement(prefill.engine, decode.engine) for prefill in prefills for decode in decodes]
    for whole in pairs:
        broken = [pair for pair in pairs if pair != whole]
        assert {place(prefills, decodes, policy, counter, (), broken) for counter in range(4)} == {whole}
    assert place(prefills, decodes, policy, 0, (), pairs) in pairs


@pytest.mark.parametrize("policy", ["round_robin", "least_load"])
def test_a_colocated_engine_is_both(policy: str) -> None:
    engines = views("colocated", [1, 0])
    for counter in range(4):
        prefill, decode = place(engines, engines, policy, counter)  # type: ignore[arg-type]
        assert prefill == decode


def test_admission_is_first_come_first_served_within_its_bounds() -> None:
    async def scenario() -> None:
        admission, order, gate = Admission(max_queue=3, max_active=2), [], asyncio.Event()

        async def one(name: int) -> None:
            async with admission.admit():
                order.append(name)
                await gate.wait()

        tasks = [asyncio.ensure_future(one(name)) for name in range(5)]
        await asyncio.sleep(0)
        assert (admission.active, admission.queued) == (2, 3)
        with pytest.raises(Overloaded, match="3 requests wait") as caught:
            await one(5)
        assert MIN_RETRY_S <= caught.value.retry_after_s <= MAX_RETRY_S
        tasks[3].cancel()
        await asyncio.sleep(0)
        assert admission.queued == 2
        gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 1, 2, 4]
        assert (admission.active, admission.queued) == (0, 0)

    asyncio.run(scenario())


def test_without_a_queue_what_fits_is_admitted() -> None:
    async def scenario() -> None:
        admission = Admission(max_queue=0, max_active=1)
        async with admission.admit():
            with pytest.raises(Overloaded):
                await admission.admit().__aenter__()
        async with admission.admit():
            assert admission.active == 1

    asyncio.run(scenario())
