"""Prefixes that one prefill engine has cached, and another one fetches: the same tokens, or computed after all."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from splitserve.cluster.counts import EngineCounts
from splitserve.cluster.messages import Cancel, RankEndpoint, SendPrefix, Ticket
from splitserve.cluster.sampling import SamplingParams
from splitserve.kv_transfer.memory import Faults
from tests.engines import ROUTER, InProcessCluster, Settings

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
PROMPT = list(range(3, 103))  # six full pages of 16, and four tokens
CACHED = 96
SETTINGS = Settings(prefills=2, chunk_tokens=32, lease_s=2.0)


def warm(settings: Settings = SETTINGS, *, folder: Path) -> tuple[InProcessCluster, list[int]]:
    """A cluster whose first prefill engine has PROMPT cached, and the answer to it."""
    cluster = InProcessCluster(folder, settings)
    cluster.ask("first", PROMPT, PARAMS)
    answer = cluster.run()["first"].tokens[0]
    cluster.settle()
    return cluster, answer


def counts(cluster: InProcessCluster, prefill: int) -> EngineCounts:
    found: EngineCounts = cluster.engines[prefill].stats().counts
    return found


def assert_nothing_is_held(cluster: InProcessCluster) -> None:
    cluster.settle()
    assert cluster.free_pages() == [cluster.settings.pages] * 3
    assert [engine.stats().staging.used for engine in cluster.engines] == [0, 0, 0]
    assert [sender.active for sender in cluster.senders] == [(), (), ()]


def test_what_another_engine_has_is_fetched_and_the_rest_computed(tiny_model: Path) -> None:
    cluster, expected = warm(folder=tiny_model)
    cluster.ask("again", PROMPT, PARAMS, prefill=1, holder=(0, CACHED))
    answer = cluster.run()["again"]
    assert answer.tokens[0] == expected
    assert answer.first is not None
    assert answer.first.cached_tokens == CACHED
    assert counts(cluster, 1) == EngineCounts(100, CACHED, CACHED, 4, 1)
    assert cluster.engines[1].stats().speed.fetched_token_s > 0
    assert_nothing_is_held(cluster)

    cluster.ask("here", PROMPT, PARAMS, prefill=1, holder=(0, CACHED))
    assert cluster.run()["here"].tokens[0] == expected
    assert counts(cluster, 1).fetched_tokens == CACHED, "it is cached here now"
    assert_nothing_is_held(cluster)


def test_the_next_turn_fetches_the_answer_from_decode(tiny_model: Path) -> None:
    cluster = InProcessCluster(tiny_model, SETTINGS)
    cluster.ask("turn 1", PROMPT, replace(PARAMS, max_tokens=60))
    turn = [*PROMPT, *cluster.run()["turn 1"].tokens[0], 7, 8, 9]
    cluster.settle()
    cluster.ask("computed", turn, PARAMS, prefill=1)
    cluster.ask("fetched", turn, PARAMS, holder=(2, 144))
    answers = cluster.run()
    assert answers["fetched"].tokens == answers["computed"].tokens
    assert counts(cluster, 0).fetched_tokens == 144 - CACHED
    (sent,) = cluster.engines[2].stats().transfers
    assert (sent.started, sent.completed) == (1, 1)
    assert_nothing_is_held(cluster)


def test_only_what_is_missing_is_fetched(tiny_model: Path) -> None:
    cluster, expected = warm(folder=tiny_model)
    cluster.ask("part", PROMPT[:40], PARAMS, prefill=1)
    cluster.run()
    cluster.ask("again", PROMPT, PARAMS, prefill=1, holder=(0, CACHED))
    assert cluster.run()["again"].tokens[0] == expected
    assert counts(cluster, 1).fetched_tokens == CACHED - 32
    assert_nothing_is_held(cluster)


@pytest.mark.parametrize("tokens", [97, 96, 80])
def test_at_least_one_token_is_computed(tiny_model: Path, tokens: int) -> None:
    cluster, _ = warm(folder=tiny_model)
    cluster.ask("alone", PROMPT[:tokens], PARAMS)
    expected = cluster.run()["alone"].tokens[0]
    cluster.ask("again", PROMPT[:tokens], PARAMS, prefill=1, holder=(0, CACHED))
    assert cluster.run()["again"].tokens[0] == expected
    assert counts(cluster, 1).fetched_tokens == (tokens - 1) // 16 * 16
    assert_nothing_is_held(cluster)


@pytest.mark.parametrize("cancelled", [False, True])
def test_prompts_that_begin_alike_fetch_once(tiny_model: Path, cancelled: bool) -> None:
    cluster, expected = warm(folder=tiny_model)
    for number in range(4):
        cluster.ask(f"{number}", PROMPT, PARAMS, prefill=1, holder=(0, CACHED))
    assert cluster.engines[1].stats().waiting == 4
    assert cluster.senders[0].active == ("0/0/prefix",)
    if cancelled:
        cluster.cancel("0")
        del cluster.answers["0"]
    assert {tuple(answer.tokens[0]) for answer in cluster.run().values()} == {tuple(expected)}
    assert counts(cluster, 1).fetched_tokens == (0 if cancelled else CACHED)
    assert counts(cluster, 1).cached_tokens == CACHED * (3 if cancelled else 4) - CACHED * cancelled
    assert_nothing_is_held(cluster)


@pytest.mark.parametrize("tokens", [[], PROMPT[:96], PROMPT[:50]])
def test_what_cannot_be_lent_is_declined(tiny_model: Path, tokens: list[int]) -> None:
    cluster, _ = warm(folder=tiny_model)
    for number in (96, 0, -1, -7):
        endpoint = RankEndpoint("nowhere", "memory", "", "", 0, 1 << 16)
        ticket = Ticket(f"x{number}", 1, cluster.layout, 0, number, 2.0, (endpoint,))
        for engine in cluster.engines:
            engine.handle(ROUTER, SendPrefix(tokens, (), ticket))
    assert_nothing_is_held(cluster)


def test_prompt_logprobs_fetch_nothing(tiny_model: Path) -> None:
    cluster, expected = warm(folder=tiny_model)
    cluster.ask("again", PROMPT, replace(PARAMS, prompt_logprobs=0), prefill=1, holder=(0, CACHED))
    assert cluster.run()["again"].tokens[0] == expected
    assert counts(cluster, 1).fetched_tokens == 0


@pytest.mark.parametrize("holder", [(0, CACHED), (9, CACHED)], ids=["evicted", "nobody answers"])
def test_what_does_not_come_is_computed(tiny_model: Path, holder: tuple[int, int]) -> None:
    cluster = InProcessCluster(tiny_model, SETTINGS)
    cluster.ask("cold", PROMPT, PARAMS, prefill=1, holder=holder)
    answer = cluster.run(patience_s=10)["cold"]
    cluster.ask("alone", PROMPT, PARAMS)
    assert answer.tokens[0] == cluster.run()["alone"].tokens[0]
    assert counts(cluster, 1) == EngineCounts(100, 0, 0, 100, 1)
    assert_nothing_is_held(cluster)


def test_while_one_prompt_waits_for_its_prefix_others_go_on(tiny_model: Path) -> None:
    cluster, expected = warm(folder=tiny_model)
    cluster.ask("waits", PROMPT, PARAMS, prefill=1, holder=(9, CACHED))
    cluster.ask("goes", PROMPT[:50], PARAMS, prefill=1)
    while not cluster.answers["goes"].tokens[0]:
        cluster.step()
        assert not cluster.answers["waits"].tokens[0]
    assert cluster.run()["waits"].tokens[0] == expected
    assert_nothing_is_held(cluster)


def test_a_prompt_without_room_does_not_keep_those_from_theirs_that_have_some(tiny_model: Path) -> None:
    cluster, expected = warm(replace(SETTINGS, pages=12, prefix_cache=True), folder=tiny_model)
    cluster.ask("fetches", PROMPT, PARAMS, prefill=1, holder=(0, CACHED))
    cluster.ask("large", [*range(100, 200), 5], PARAMS, prefill=1)
    answers = cluster.run()
    assert answers["fetches"].tokens[0] == expected
    assert len(answers["large"].tokens[0]) == 6
    assert_nothing_is_held(cluster)


@pytest.mark.parametrize("seed", range(12))
def test_over_faulty_links_and_cancelled_anywhere(tiny_model: Path, seed: int) -> None:
    dice = random.Random(seed)
    faults = Faults(drop=0.05, repeat=0.1, corrupt=0.05, delay_s=0.003)
    settings = replace(SETTINGS, faults=faults, seed=seed, copies_take_s=0.003, late_tickets=6)
    cluster, expected = warm(settings, folder=tiny_model)
    for number in range(4):
        cluster.ask(f"{number}", PROMPT[: 100 - number], PARAMS, prefill=1, holder=(dice.choice([0, 0, 9]), CACHED))
    for _ in range(dice.randint(0, 40)):
        cluster.step()
    cluster.cancel("1")
    del cluster.answers["1"]
    cluster.engines[0].handle(ROUTER, Cancel("2", 0))
    answers = cluster.run(patience_s=20)
    assert answers["0"].failed is not None or answers["0"].tokens[0] == expected
    assert_nothing_is_held(cluster)
