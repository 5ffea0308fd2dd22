"""A prefill and a decode engine together: every request has one outcome, and everything is freed."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from splitserve.cluster.messages import Cancel, RankEndpoint, SendTo, Ticket
from splitserve.cluster.sampling import SamplingParams
from splitserve.kv_transfer.memory import Faults
from tests.engines import ROUTER, InProcessCluster, Settings

PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)
PROMPT = list(range(3, 60))
BOTH = pytest.mark.parametrize("split", [True, False], ids=["split", "colocated"])


def assert_everything_is_free(cluster: InProcessCluster) -> None:
    cluster.settle()
    assert cluster.free_pages() == [cluster.settings.pages] * len(cluster.blocks)
    if cluster.settings.split:
        assert cluster.staging.granted_bytes == 0
    for engine in cluster.engines:
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)


@BOTH
def test_the_first_token_comes_from_prefill(tiny_model: Path, split: bool) -> None:
    cluster = InProcessCluster(tiny_model, Settings(split=split))
    cluster.ask("a", PROMPT, PARAMS)
    answer = cluster.run()["a"]
    assert answer.first is not None
    assert answer.joined
    assert [token.token_id for token in answer.first.tokens] == answer.tokens[0][:1]
    assert answer.reasons == {0: "length"}
    assert len(answer.tokens[0]) == 10
    assert_everything_is_free(cluster)


@BOTH
def test_a_single_token_needs_no_decode_step(tiny_model: Path, split: bool) -> None:
    cluster = InProcessCluster(tiny_model, Settings(split=split))
    cluster.ask("a", PROMPT, replace(PARAMS, max_tokens=1))
    answer = cluster.run()["a"]
    assert answer.reasons == {0: "length"}
    assert_everything_is_free(cluster)


@BOTH
def test_stop_ids_and_min_tokens(tiny_model: Path, split: bool) -> None:
    cluster = InProcessCluster(tiny_model, Settings(split=split))
    cluster.ask("free", PROMPT, PARAMS)
    tokens = cluster.run()["free"].tokens[0]
    stop = tokens[4]
    cluster.ask("stopped", PROMPT, replace(PARAMS, stop_token_ids=(stop,)))
    stopped = cluster.run()["stopped"]
    assert stopped.tokens[0] == tokens[: tokens.index(stop) + 1]
    assert stopped.reasons == {0: "stop"}
    cluster.ask("longer", PROMPT, replace(PARAMS, stop_token_ids=(stop,), min_tokens=8))
    assert stop not in cluster.run()["longer"].tokens[0][:8]


@BOTH
def test_samples_go_on_where_the_first_one_ends_with_its_first_token(tiny_model: Path, split: bool) -> None:
    cluster = InProcessCluster(tiny_model, Settings(split=split))
    params = replace(PARAMS, n=3, temperature=5.0, seed=1)
    cluster.ask("a", PROMPT, params)
    whole = cluster.run()["a"].tokens
    stop = whole[0][0]
    assert stop not in (whole[1][0], whole[2][0])
    cluster.ask("stopped", PROMPT, replace(params, stop_token_ids=(stop,)))
    stopped = cluster.run(patience_s=10.0)["stopped"]
    assert stopped.tokens[0] == [stop]
    for sample in (1, 2):
        assert stopped.tokens[sample] == whole[sample][: len(stopped.tokens[sample])]
        assert stopped.reasons[sample] == ("stop" if stop in whole[sample] else "length")
    assert_everything_is_free(cluster)


@BOTH
def test_the_context_ends_a_sequence(tiny_model: Path, split: bool) -> None:
    cluster = InProcessCluster(tiny_model, Settings(split=split, context=64))
    cluster.ask("a", PROMPT, SamplingParams(ignore_eos=True))
    answer = cluster.run()["a"]
    assert len(PROMPT) + len(answer.tokens[0]) == 64
    assert answer.reasons == {0: "length"}


@BOTH
def test_prompt_logprobs_cover_the_prompt_however_it_is_chunked(tiny_model: Path, split: bool) -> None:
    collected = []
    for chunk_tokens in (16, 512):
        cluster = InProcessCluster(tiny_model, Settings(split=split, chunk_tokens=chunk_tokens))
        for name in ("cold", "warm"):  # the second one finds the prefix cached, and needs all logits nevertheless
            cluster.ask(name, PROMPT, replace(PARAMS, prompt_logprobs=2))
            first = cluster.run()[name].first
            assert first is not None
            assert first.prompt_logprobs is not None
            assert len(first.prompt_logprobs) == len(PROMPT) - 1
            collected.append(first.prompt_logprobs)
    assert all(logprobs == collected[0] for logprobs in collected)


@BOTH
@pytest.mark.parametrize("seed", range(20))
def test_cancelled_anywhere_everything_is_freed(tiny_model: Path, split: bool, seed: int) -> None:
    dice = random.Random(seed)
    cluster = InProcessCluster(tiny_model, Settings(split=split, chunk_tokens=16, prefix_cache=dice.random() < 0.5))
    for index in range(4):
        cluster.ask(f"{index}", dice.choices(range(3, 300), k=80), replace(PARAMS, n=dice.choice([1, 2])))
    for _ in range(dice.randint(0, 30)):
        cluster.step()
    for name in ("0", "2"):
        cluster.cancel(name)
        del cluster.answers[name]
    answers = cluster.run()
    assert all(answer.failed is None for answer in answers.values())
    assert_everything_is_free(cluster)


@BOTH
def test_one_sample_can_be_cancelled(tiny_model: Path, split: bool) -> None:
    cluster = InProcessCluster(tiny_model, Settings(split=split))
    cluster.ask("a", PROMPT, replace(PARAMS, n=3, temperature=1.0, max_tokens=40))
    while len(cluster.answers["a"].tokens[1]) < 5:
        cluster.step()
    cluster.cancel("a", sample=1)
    cluster.answers["a"].reasons[1] = "cancelled"
    answer = cluster.run()["a"]
    assert len(answer.tokens[1]) == 5
    assert len(answer.tokens[0]) == len(answer.tokens[2]) == 40
    assert_everything_is_free(cluster)


@BOTH
def test_a_router_that_falls_silent_loses_its_requests(tiny_model: Path, split: bool) -> None:
    cluster = InProcessCluster(tiny_model, Settings(split=split))
    for index in range(6):
        cluster.ask(f"{index}", PROMPT, replace(PARAMS, max_tokens=300))
        cluster.step()
    for engine in cluster.engines:
        engine.forget(ROUTER)
    assert_everything_is_free(cluster)


@BOTH
def test_bad_requests_fail_alone(tiny_model: Path, split: bool) -> None:
    cluster = InProcessCluster(tiny_model, Settings(split=split))
    cluster.ask("good", PROMPT, PARAMS)
    cluster.ask("empty", [], PARAMS)
    cluster.ask("long", [5] * 512, PARAMS)
    cluster.ask("vocabulary", [10**6], PARAMS)
    cluster.ask("temperature", PROMPT, replace(PARAMS, temperature=-1.0))
    answers = cluster.run()
    assert answers["good"].failed is None
    for name, field in {"empty": "prompt", "long": "prompt", "vocabulary": "token_ids"}.items():
        failed = answers[name].failed
        assert failed is not None
        assert failed.code == "INVALID_ARGUMENT"
        assert failed.message.startswith(field)
    assert_everything_is_free(cluster)


def test_a_full_decode_engine_says_busy_and_serves_all(tiny_model: Path) -> None:
    cluster = InProcessCluster(tiny_model, Settings(slots=2, max_sequences=3))
    for index in range(12):
        cluster.ask(f"{index}", PROMPT[: 20 + index], PARAMS)
    answers = cluster.run()
    assert all(len(answer.tokens[0]) == 10 for answer in answers.values())
    assert_everything_is_free(cluster)


def test_prompts_that_come_while_decode_is_full_are_parked(tiny_model: Path) -> None:
    """All have their first token before the first two answers end, and prefill has its pages back."""
    params = replace(PARAMS, max_tokens=60, ignore_eos=True)
    prompts = {f"{index}": [7 + index, *PROMPT[: 20 if index < 2 else 40]] for index in range(8)}
    roomy = InProcessCluster(tiny_model, Settings(prefix_cache=False))
    tight = InProcessCluster(tiny_model, Settings(slots=2, pages=14, prefix_cache=False))
    for name, prompt in prompts.items():
        for cluster in (roomy, tight):
            cluster.ask(name, prompt, params)
    while not all(answer.joined for answer in tight.answers.values()):
        tight.step()
        assert not any(answer.reasons or answer.failed for answer in tight.answers.values())
    tight.step()
    assert tight.engines[-1]._slots.parked > 0
    assert tight.free_pages()[0] == 14
    expected, answers = roomy.run(), tight.run()
    assert {name: answers[name].tokens for name in prompts} == {name: expected[name].tokens for name in prompts}
    assert_everything_is_free(tight)


def test_the_next_turn_finds_what_decode_has_written(tiny_model: Path) -> None:
    cluster = InProcessCluster(tiny_model, Settings(page_size=16))
    cluster.ask("first", PROMPT[:20], replace(PARAMS, max_tokens=40, ignore_eos=True))
    answer = cluster.run()["first"].tokens[0]
    cluster.ask("second", [*PROMPT[:20], *answer, *PROMPT[20:25]], PARAMS)
    (table,) = cluster.engines[-1]._requests["second/0"].tables
    assert table.cached_tokens == (20 + 40 - 1) // 16 * 16, "all full pages of the first turn, its answer included"
    cluster.run()
    assert_everything_is_free(cluster)


def test_engines_do_not_rest_while_kv_is_being_copied(tiny_model: Path) -> None:
    cluster = InProcessCluster(tiny_model, Settings(copies_take_s=0.1))
    cluster.ask("a", PROMPT, PARAMS)
    busy = [0, 0]
    deadline = time.monotonic() + 60
    while len(cluster.answers["a"].reasons) < 1:
        assert time.monotonic() < deadline
        for index, (engine, device) in enumerate(zip(cluster.engines, cluster.devices, strict=True)):
            device.tick()
            worked = engine.step()
            busy[index] += device.busy
            assert worked or not device.busy
    assert min(busy) > 0
    assert_everything_is_free(cluster)


@pytest.mark.parametrize("seed", range(10))
def test_faulty_links_change_no_token(tiny_model: Path, seed: int) -> None:
    """Lost, late, repeated and damaged KV messages: a request gets its tokens, or a clear error, and nothing leaks."""
    params = replace(PARAMS, temperature=0.8, seed=seed)
    quiet = InProcessCluster(tiny_model)
    faults = Faults(drop=0.1, repeat=0.1, corrupt=0.1, delay_s=0.01)
    slow = (0.0, 0.02)[seed % 2]
    noisy = InProcessCluster(tiny_model, Settings(faults=faults, copies_take_s=slow, seed=seed, lease_s=0.4))
    for cluster in (quiet, noisy):
        for index in range(4):
            cluster.ask(f"{index}", random.Random(index).choices(range(3, 300), k=100), params)
    expected, answers = quiet.run(), noisy.run()
    for name, answer in answers.items():
        if answer.failed is None:
            assert answer.tokens == expected[name].tokens
        else:
            assert answer.failed.code == "UNAVAILABLE"
    assert_everything_is_free(noisy)


@pytest.mark.parametrize("seed", range(10))
def test_prompts_are_computed_before_their_tickets_come(tiny_model: Path, seed: int) -> None:
    prompts = [PROMPT[: 20 + 9 * number] for number in range(5)]
    tokens = []
    for late in (0, 12):
        cluster = InProcessCluster(tiny_model, Settings(chunk_tokens=24, late_tickets=late, seed=seed))
        for number, prompt in enumerate(prompts):
            cluster.ask(str(number), prompt, replace(PARAMS, n=1 + number % 2, seed=7, temperature=0.8))
        tokens.append({name: dict(answer.tokens) for name, answer in cluster.run().items()})
        assert_everything_is_free(cluster)
    assert tokens[1] == tokens[0]


def test_a_ticket_of_another_transfer_is_declined(tiny_model: Path) -> None:
    cluster = InProcessCluster(tiny_model, Settings(late_tickets=4, seed=1))
    cluster.ask("a", PROMPT, PARAMS)
    endpoint = RankEndpoint("nowhere", "memory", "", "", 0, 1 << 16)
    for name in ("b/0", "", "a/1"):
        ticket = Ticket(name, 1, cluster.layout, 0, len(PROMPT), 2.0, (endpoint,))
        cluster.engines[0].handle(ROUTER, SendTo("a", 0, ticket))
        cluster.engines[0].handle(ROUTER, SendTo("b", 0, ticket))
        cluster.step()
    assert len(cluster.run()["a"].tokens[0]) == 10
    assert_everything_is_free(cluster)


@pytest.mark.parametrize("steps", range(6))
def test_what_ends_before_its_ticket_comes_is_freed_and_so_is_the_reservation(tiny_model: Path, steps: int) -> None:
    cluster = InProcessCluster(tiny_model, Settings(chunk_tokens=24, late_tickets=1000, seed=1))
    cluster.ask("a", PROMPT, PARAMS)
    for _ in range(steps):
        cluster.step()
    prefill, decode = cluster.engines
    prefill.handle(ROUTER, Cancel("a", 0))
    assert cluster.blocks[0].free_pages == cluster.settings.pages
    assert decode.stats().waiting == 1
    began = time.monotonic()
    for _ in range(1000):
        cluster.step()
    assert cluster.answers["a"].failed is not None
    assert time.monotonic() - began < cluster.settings.lease_s, "only the lease ended it"
    assert_everything_is_free(cluster)
