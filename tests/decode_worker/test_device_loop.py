"""The device-resident loop answers what steps one by one answer, and frees what they free.

Without a GPU the same loop runs with every kernel in Triton's interpreter, on few and short requests.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from llguidance import LLMatcher

from splitserve.cluster.errors import ProtocolError
from splitserve.cluster.sampling import SamplingParams
from splitserve.decode_worker.device_loop import LaunchStep, PendingStep
from splitserve.engine.slot_state import SlotUpdateBuilder, SlotUpdates
from splitserve.kernels.launch import INTERPRETING
from tests.engines import Answer, InProcessCluster, Settings

DEVICE = "cpu" if INTERPRETING else "cuda"
pytestmark = [] if INTERPRETING else [pytest.mark.gpu]

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.9, top_p=0.9, seed=5, logprobs=2)
PENALISED = replace(SAMPLED, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, n=2)
BIASED = replace(GREEDY, logit_bias={7: 50.0, 9: 51.0, 11: -100.0}, logprobs=0)
PARAMS = (GREEDY, SAMPLED, PENALISED, BIASED)
SETTINGS = Settings(device=DEVICE, page_size=16, slots=4, context=128, lease_s=20 if INTERPRETING else 300)
GRAPHS = replace(SETTINGS, capacities=(2, 4))


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=length)


def answers(folder: Path, settings: Settings) -> dict[str, Answer]:
    cluster = InProcessCluster(folder, settings)
    for index, params in enumerate(PARAMS):
        cluster.ask(str(index), prompt(13 + 9 * index, index), params)
    found = cluster.run()
    cluster.settle()
    assert cluster.free_pages() == [settings.pages] * len(cluster.blocks)
    return found


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> dict[str, Answer]:
    return answers(tiny_model, SETTINGS)


@pytest.mark.parametrize("pages", [256, 10], ids=["room", "preemption"])
def test_same_answers_as_step_by_step(tiny_model: Path, expected: dict[str, Answer], pages: int) -> None:
    found = answers(tiny_model, replace(GRAPHS, split=False, pages=pages))
    for name, answer in expected.items():
        assert found[name].tokens == answer.tokens
        assert found[name].reasons == answer.reasons
        for sample, logprobs in answer.logprobs.items():
            for ours, theirs in zip(found[name].logprobs[sample], logprobs, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is None or theirs is None:
                    continue
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
                assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


def test_constrained_answers_are_those_of_steps_one_by_one(tiny_model: Path) -> None:
    """Beside another that is not constrained."""
    regex = LLMatcher.grammar_from_regex("[a-f]{3}!?")
    asked = (replace(SAMPLED, ignore_eos=False, grammar=regex), replace(GREEDY, max_tokens=3))
    found = []
    for settings in (SETTINGS, replace(GRAPHS, split=False, capacities=(2,), slots=2)):
        cluster = InProcessCluster(tiny_model, settings)
        for index, params in enumerate(asked):
            cluster.ask(str(index), prompt(13, index), params)
        answers = cluster.run()
        found.append({name: (answer.tokens, answer.reasons) for name, answer in answers.items()})
        cluster.settle()
        assert cluster.free_pages() == [settings.pages] * len(cluster.blocks)
    assert found[0] == found[1]
    assert found[0]["0"][1] == {0: "stop"}


def test_a_slot_keeps_no_mask_of_the_sequence_before(tiny_model: Path) -> None:
    """Which would hold for one of the same length, whose own mask is still being made."""
    first, second = (
        SamplingParams(max_tokens=8, grammar=LLMatcher.grammar_from_regex(regex)) for regex in ("[a-f]", "[0-9]{4}")
    )
    found = []
    for settings in (replace(SETTINGS, slots=2), replace(GRAPHS, split=False, capacities=(2,), slots=2)):
        cluster = InProcessCluster(tiny_model, settings)
        cluster.ask("first", prompt(13, 1), first)
        while not cluster.answers["first"].joined:
            cluster.step()
        cluster.ask("beside", prompt(13, 2), replace(GREEDY, max_tokens=30))
        while not cluster.answers["first"].reasons:
            cluster.step()
        cluster.ask("second", prompt(13, 3), second)
        answers = cluster.run()
        found.append((answers["second"].tokens, answers["second"].reasons))
    assert found[0] == found[1]


def test_stop_ids_and_min_tokens(tiny_model: Path, expected: dict[str, Answer]) -> None:
    cluster = InProcessCluster(tiny_model, replace(GRAPHS, split=False))
    stop = expected["0"].tokens[0][3]
    assert stop not in expected["0"].tokens[0][:3]
    cluster.ask("stopped", prompt(13, 0), replace(GREEDY, stop_token_ids=(stop,)))
    cluster.ask("barred", prompt(13, 0), replace(GREEDY, stop_token_ids=(stop,), min_tokens=4))
    found = cluster.run()
    assert found["stopped"].tokens[0] == expected["0"].tokens[0][:4]
    assert found["stopped"].reasons == {0: "stop"}
    assert stop not in found["barred"].tokens[0][:4]


@pytest.mark.parametrize("seed", range(3))
def test_cancelled_anywhere_everything_is_freed(tiny_model: Path, expected: dict[str, Answer], seed: int) -> None:
    dice = random.Random(seed)
    cluster = InProcessCluster(tiny_model, replace(GRAPHS, pages=24))
    for index, params in enumerate(PARAMS):
        cluster.ask(str(index), prompt(13 + 9 * index, index), params)
    for _ in range(dice.randint(2, 8)):
        cluster.step()
    gone = dice.sample(range(4), 2)
    for index in gone:
        cluster.cancel(str(index))
        del cluster.answers[str(index)]
    for name, answer in cluster.run().items():
        assert answer.tokens == expected[name].tokens
    cluster.settle()
    assert cluster.free_pages() == [24, 24]


def test_results_may_come_late(tiny_model: Path, expected: dict[str, Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    looks: dict[PendingStep, int] = {}
    dice = random.Random(0)

    def ready(pending: PendingStep) -> bool:
        looks[pending] = looks.get(pending, dice.randint(0, 3)) - 1
        return looks[pending] < 0

    monkeypatch.setattr(PendingStep, "ready", property(ready))
    cluster = InProcessCluster(tiny_model, GRAPHS)
    for index in (0, 1):
        cluster.ask(str(index), prompt(13 + 9 * index, index), PARAMS[index])
    for name, answer in cluster.run().items():
        assert answer.tokens == expected[name].tokens
    cluster.settle()
    assert cluster.free_pages() == [256, 256]
    assert len(looks) > 4


def test_a_step_under_way_keeps_nobody_waiting(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a device is at work for others, a request is granted, prefilled, and its KV taken."""
    monkeypatch.setattr(PendingStep, "ready", False)
    cluster = InProcessCluster(tiny_model, GRAPHS)
    cluster.ask("first", prompt(13, 0), GREEDY)
    cluster.ask("second", prompt(22, 1), GREEDY)
    deadline = time.monotonic() + 60
    while not (cluster.answers["first"].joined and cluster.engines[1].stats().running == 2):
        cluster.step()
        assert time.monotonic() < deadline
    cluster.ask("third", prompt(31, 2), GREEDY)
    while not cluster.answers["third"].joined:
        cluster.step()
        assert time.monotonic() < deadline
    assert all(len(answer.tokens[0]) == 1 for answer in cluster.answers.values()), "no step has ended"


def test_steps_come_in_order(tiny_model: Path) -> None:
    cluster = InProcessCluster(tiny_model, replace(GRAPHS, capacities=(2,)))
    cluster.loop.launch(LaunchStep(0, 2, SlotUpdates(), top=False)).wait()
    with pytest.raises(ProtocolError, match="step 2 came where 1 was due"):
        cluster.loop.launch(LaunchStep(2, 2, SlotUpdates(), top=False))


def test_a_slot_waits_for_its_grammar_mask_while_others_go_on(tiny_model: Path) -> None:
    loop = InProcessCluster(tiny_model, replace(GRAPHS, capacities=(2,))).loop
    updates = SlotUpdateBuilder(loop.layout)
    plain = {"length": 1, "room": 16, "last_token": 5, "top_p": 1, "repetition_penalty": 1, "logprobs": -1}
    updates.set(0, plain)
    updates.set(1, plain | {"grammar": 1})
    updates.fill(0, "block_table", [1])
    updates.fill(1, "block_table", [2])
    ran = []
    for step in range(4):
        if step == 2:
            mask = np.zeros(loop.layout.fields["mask"].shape, np.int32)
            mask[40 // 32] |= 1 << 40 % 32
            updates.allow(1, 1, mask)
        ran.append(loop.launch(LaunchStep(step, 2, updates.take(), top=False)).wait())
    assert [[row.slot for row in rows] for rows in ran] == [[0], [0], [0, 1], [0]]
    assert ran[2][1].token_id == 40
    assert torch.isfinite(torch.tensor([row.logprob for rows in ran for row in rows])).all()
