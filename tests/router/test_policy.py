from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest

from splitserve.cluster.errors import Overloaded
from splitserve.cluster.messages import EngineSpeed
from splitserve.router.admission import MAX_RETRY_S, MIN_RETRY_S, Admission
from splitserve.router.fair import Claimant
from splitserve.router.policy import (
    FETCH_S,
    NO_FETCH,
    EngineView,
    Fetch,
    Placement,
    Policy,
    Wanted,
    lateness,
    place,
    predicted_ttfts,
)

ANY = Wanted()


def views(role: str, loads: list[int]) -> list[EngineView]:
    return [EngineView(f"{role}/{index}/0", role, load) for index, load in enumerate(loads)]  # type: ignore[arg-type]


def test_round_robin_takes_turns_whatever_the_load() -> None:
    prefills, decodes = views("prefill", [9, 0]), views("decode", [0, 9, 0])
    pairs = [place(prefills, decodes, "round_robin", counter, Wanted()) for counter in range(6)]
    assert Counter(prefill for prefill, _ in pairs) == {"prefill/0/0": 3, "prefill/1/0": 3}
    assert Counter(decode for _, decode in pairs) == {f"decode/{index}/0": 2 for index in range(3)}


def test_least_load_takes_the_least_loaded_and_spreads_ties() -> None:
    prefills, decodes = views("prefill", [3, 1]), views("decode", [2, 1, 1])
    chosen = [place(prefills, decodes, "least_load", counter, Wanted()) for counter in range(30)]
    assert {prefill for prefill, _ in chosen} == {"prefill/1/0"}
    ties = Counter(decode for _, decode in chosen)
    assert set(ties) == {"decode/1/0", "decode/2/0"}
    assert min(ties.values()) >= 10


def test_of_equally_loaded_prefill_engines_a_linked_one_comes_first() -> None:
    prefills, decodes, linked = views("prefill", [1, 1, 1]), views("decode", [0, 0]), set[Placement]()
    for counter in range(30):
        linked.add(place(prefills, decodes, "least_load", counter, Wanted(), linked))
    assert len(linked) == 2, "a link for each decode engine, none for every pair"
    prefill, _ = place(
        views("prefill", [2, 2, 1]), decodes, "least_load", 0, Wanted(), linked={Placement("prefill/0/0", "decode/0/0")}
    )
    assert prefill == "prefill/2/0"


@pytest.mark.parametrize("policy", get_args(Policy))
def test_broken_pairs_are_chosen_where_there_are_no_others(policy: Policy) -> None:
    prefills, decodes = views("prefill", [0, 0]), views("decode", [0, 1])
    pairs = [Placement(prefill.engine, decode.engine) for prefill in prefills for decode in decodes]
    for whole in pairs:
        broken = [pair for pair in pairs if pair != whole]
        assert {place(prefills, decodes, policy, counter, Wanted(broken=broken)) for counter in range(4)} == {whole}
    assert place(prefills, decodes, policy, 0, Wanted(broken=pairs)) in pairs


@pytest.mark.parametrize("policy", get_args(Policy))
def test_a_colocated_engine_is_both(policy: Policy) -> None:
    engines = views("colocated", [1, 0])
    for counter in range(4):
        prefill, decode = place(engines, engines, policy, counter, Wanted())
        assert prefill == decode


def fast(engine: str, pending: int = 0, *, placed_tokens: int = 0, rate: float = 10_000.0) -> EngineView:
    speed = EngineSpeed(pending, 1, 0.0, 1 / rate) if rate else EngineSpeed(pending)
    return EngineView(engine, "prefill", 0, 0, placed_tokens, speed=speed)


def decoding(engine: str, running: int, step_s: float, *, free: int = 100_000, slots: int = 64) -> EngineView:
    return EngineView(engine, "decode", running, 0, 0, free, slots, EngineSpeed(step_s=step_s))


def prefill_of(prefills: list[EngineView], wanted: Wanted) -> str:
    return place(prefills, views("decode", [0]), "kv_aware", 0, wanted).prefill


def decode_of(decodes: list[EngineView], wanted: Wanted = ANY) -> str:
    return place(views("prefill", [0]), decodes, "kv_aware", 0, wanted).decode


def test_a_cached_prefix_is_worth_the_time_that_computing_it_takes() -> None:
    wanted = Wanted(tokens=2000, cached={"warm": 1900})
    assert prefill_of([fast("cold"), fast("warm")], wanted) == "warm"
    assert prefill_of([fast("cold"), fast("warm", 1800)], wanted) == "warm"
    assert prefill_of([fast("cold"), fast("warm", 2000)], wanted) == "cold"
    assert prefill_of([fast("cold"), fast("warm", placed_tokens=2000)], wanted) == "cold"
    assert prefill_of([fast("cold", rate=90_000.0), fast("warm", 500)], wanted) == "cold"
    assert prefill_of([fast("new", rate=0.0), fast("warm", 2500)], wanted) == "new", "as fast as the fastest"


def test_what_batches_take_counts_by_the_batch() -> None:
    def engine(name: str, pending: int) -> EngineView:
        return EngineView(name, "prefill", 0, speed=EngineSpeed(pending, 2048, 0.03))

    wanted = Wanted(tokens=2000, cached={"warm": 1900})
    predicted = predicted_ttfts([engine("a", 0), engine("warm", 0), engine("late", 6200)], wanted)
    assert {name: seconds for name, (seconds, _) in predicted.items()} == pytest.approx(
        {"a": 0.03, "warm": 0.03, "late": 0.15}
    )
    assert prefill_of([engine("a", 0), engine("warm", 0)], wanted) == "warm", "of equal times"
    assert prefill_of([engine("a", 0), engine("warm", 6200)], wanted) == "a"


def test_a_slow_engine_is_tried_again() -> None:
    """Else one slow batch, long ago, would keep all prompts away from it."""

    def slow(rested_s: float) -> EngineView:
        return EngineView("slow", "prefill", 0, speed=EngineSpeed(0, 1, 0.0, 1e-2, rested_s))

    assert prefill_of([slow(0.1), fast("busy", 500)], Wanted(tokens=1000)) == "busy"
    assert prefill_of([slow(60.0), fast("busy", 500)], Wanted(tokens=1000)) == "slow"
    assert prefill_of([slow(60.0), fast("idle")], Wanted(tokens=1000, cached={"idle": 500})) == "idle"


def test_decode_goes_where_the_answer_is_done_first() -> None:
    assert decode_of([decoding("a", 20, 0.010), decoding("b", 14, 0.009)]) == "b"
    assert decode_of([decoding("a", 20, 0.010), decoding("b", 25, 0.005)]) == "b"
    assert decode_of([decoding("busy", 20, 0.010), decoding("idle", 0, 0.0)]) == "idle"
    assert decode_of([decoding("full", 4, 0.002, slots=4), decoding("b", 8, 0.002)]) == "b"
    tight = [decoding("tight", 4, 0.002, free=900), decoding("b", 8, 0.003)]
    assert decode_of(tight, Wanted(tokens=1000)) == "b"
    assert decode_of(tight, Wanted(tokens=1000, cached={"tight": 512})) == "tight"
    slow = [decoding("slow", 4, 0.020), decoding("b", 40, 0.020)]
    assert decode_of(slow, Wanted(tpot_s=0.022)) == "b"


@pytest.mark.parametrize("running", [0, 20])
def test_a_burst_between_two_looks_is_spread(running: int) -> None:
    """Of two engines, one idle and one that decodes, nobody hears anything while 200 requests are placed."""
    placed = Counter[str]()
    for counter in range(200):
        decodes = [decoding("a", running, 0.01 if running else 0.0), decoding("b", 0, 0.0)]
        decodes = [replace(one, load=one.load + placed[one.engine], placed=placed[one.engine]) for one in decodes]
        prefills = [fast(name, placed_tokens=1000 * placed[name]) for name in ("c", "d", "e")]
        placed.update(place(prefills, decodes, "kv_aware", counter, Wanted(tokens=1000)))
    assert abs(placed["a"] + running - placed["b"]) <= 4
    assert max(placed[name] for name in "cde") - min(placed[name] for name in "cde") <= 1


def test_equal_engines_take_turns_and_linked_ones_come_first() -> None:
    prefills, decodes = [fast("a"), fast("b")], [decoding("c", 0, 0.0), decoding("d", 0, 0.0)]
    pairs = Counter(place(prefills, decodes, "kv_aware", counter, Wanted()) for counter in range(8))
    assert {decode for _, decode in pairs} == {"c", "d"}
    linked = {Placement("b", "c"), Placement("b", "d")}
    assert {place(prefills, decodes, "kv_aware", counter, Wanted(), linked).prefill for counter in range(8)} == {"b"}


def test_colocated_engines_are_chosen_for_both_of_their_parts() -> None:
    both = [
        EngineView("a", "colocated", 4, free_tokens=9000, slots=64, speed=EngineSpeed(0, 1, 0.0, 1e-4, step_s=0.01)),
        EngineView("b", "colocated", 4, free_tokens=9000, slots=64, speed=EngineSpeed(4000, 1, 0.0, 1e-4, step_s=0.01)),
    ]
    assert place(both, both, "kv_aware", 0, Wanted(tokens=2000)) == ("a", "a")
    assert place(both, both, "kv_aware", 0, Wanted(tokens=6000, cached={"b": 5900})) == ("b", "b")


def test_lateness_is_what_the_prediction_passes_the_limit_by() -> None:
    assert lateness(fast("a", 9000), 1.0, 2.0) == 0.0
    assert lateness(fast("a", 9000), 1.0, 0.25) == pytest.approx(0.75)
    assert lateness(fast("new", 9000, rate=0.0), 1.0, 0.25) == 0.0
    assert lateness(fast("idle", rate=1.0), 1.0, 0.25) == 0.0, "else nobody would ever see that it is faster now"


def test_prefixes_are_fetched_where_that_is_faster() -> None:
    def one(name: str, pending: int = 0, token_s: float = 0.0, fetches: bool = True) -> EngineView:
        view = fast(name, pending)
        return replace(view, fetches=fetches, speed=replace(view.speed, fetched_token_s=token_s))

    wanted, warm = Wanted(tokens=2000, cached={"warm": 1600, "cold": 400}), one("warm", 1_000_000)

    def of(cold: EngineView) -> tuple[int, Fetch]:
        seconds, fetch = predicted_ttfts([cold, warm], wanted)["cold"]
        return round(1e6 * seconds), fetch

    assert of(one("cold", fetches=False)) == (160_000, NO_FETCH)
    assert of(one("cold", token_s=1e-6)) == (1e6 * FETCH_S + 1200 + 40_000, Fetch("warm", 1600))
    assert of(one("cold", 3000, token_s=1e-6)) == (340_000, Fetch("warm", 1600)), "while others are computed"
    assert of(one("cold", token_s=0.9e-4))[1] == Fetch("warm", 1600)
    assert of(one("cold", token_s=1.1e-4)) == (160_000, NO_FETCH), "computing is faster"
    assert of(one("cold"))[1] == Fetch("warm", 1600), "to see how fast it is"
    assert predicted_ttfts([one("cold"), warm], wanted)["warm"][1] == NO_FETCH, "nobody has more"
    assert predicted_ttfts([one("cold"), warm], Wanted(tokens=20))["cold"][1] == NO_FETCH
    wanted_of_decode = replace(wanted, cached={"warm": 1600, "decode/0/0": 1920})
    assert predicted_ttfts([one("cold"), warm], wanted_of_decode)["cold"][1] == Fetch("decode/0/0", 1920)
    assert prefill_of([one("cold"), warm], wanted) == "cold"


def test_admission_is_first_come_first_served_within_its_bounds() -> None:
    async def scenario() -> None:
        admission, order, gate = Admission(max_queue=3, max_active=2), [], asyncio.Event()

        async def one(name: int) -> None:
            async with admission.admit(Claimant()):
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
        async with admission.admit(Claimant()):
            with pytest.raises(Overloaded):
                await admission.admit(Claimant()).__aenter__()
        async with admission.admit(Claimant()):
            assert admission.active == 1

    asyncio.run(scenario())
