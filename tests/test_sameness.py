"""Same request, same tokens: whatever is around it, however it is cut, split or not, greedy and sampled."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from splitserve.cluster.sampling import SamplingParams
from tests.engines import Answer, InProcessCluster, Settings
from tests.tiny_model import write_tiny_model, write_tiny_moe

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=3)
SAMPLED = replace(GREEDY, temperature=0.9, top_p=0.95, top_k=50, seed=7)
PENALISED = replace(SAMPLED, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.2, min_p=0.01)
SEVERAL = replace(SAMPLED, n=3)
PARAMS = {"greedy": GREEDY, "sampled": SAMPLED, "penalised": PENALISED, "several": SEVERAL}


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=length)


@pytest.fixture(scope="module", params=["dense", "latent-moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write = write_tiny_model if request.param == "dense" else write_tiny_moe
    return write(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def reference(model: Path) -> dict[str, Answer]:
    """Each kind of request alone in a colocated engine that takes the prompt in one chunk."""
    answers = {}
    for name, params in PARAMS.items():
        cluster = InProcessCluster(model, Settings(split=False, chunk_tokens=512, prefix_cache=False))
        cluster.ask(name, prompt(150), params)
        answers[name] = cluster.run()[name]
    return answers


def assert_same(answer: Answer, expected: Answer) -> None:
    assert answer.tokens == expected.tokens
    assert answer.logprobs == expected.logprobs, "the tokens agree, but not the bits behind them"


@pytest.mark.parametrize("split", [True, False], ids=["split", "colocated"])
@pytest.mark.parametrize("chunk_tokens", [16, 64, 512])
@pytest.mark.parametrize("page_size", [16, 64])
def test_alone(model: Path, reference: dict[str, Answer], split: bool, chunk_tokens: int, page_size: int) -> None:
    settings = Settings(split=split, chunk_tokens=chunk_tokens, page_size=page_size)
    for name, params in PARAMS.items():
        cluster = InProcessCluster(model, settings)
        cluster.ask(name, prompt(150), params)
        assert_same(cluster.run()[name], reference[name])


@pytest.mark.parametrize("split", [True, False], ids=["split", "colocated"])
@pytest.mark.parametrize("seed", range(3))
def test_among_30_neighbours(model: Path, reference: dict[str, Answer], split: bool, seed: int) -> None:
    dice = random.Random(seed)
    cluster = InProcessCluster(model, Settings(split=split, chunk_tokens=96))
    names = list(PARAMS)
    for index in range(30):
        if index % 8 == 3 and names:
            name = names.pop()
            cluster.ask(name, prompt(150), PARAMS[name])
        params = replace(SAMPLED, max_tokens=dice.randint(1, 40), seed=index, temperature=dice.choice([0.0, 0.7, 1.5]))
        cluster.ask(f"neighbour {index}", prompt(dice.randint(1, 300), seed=index + 1), params)
        for _ in range(dice.randint(0, 3)):
            cluster.step()
    answers = cluster.run()
    assert not names
    for name in PARAMS:
        assert_same(answers[name], reference[name])


@pytest.mark.parametrize("split", [True, False], ids=["split", "colocated"])
@pytest.mark.parametrize("after", [1, 7, 23])
def test_going_on_elsewhere(model: Path, reference: dict[str, Answer], split: bool, after: int) -> None:
    """Prompt and answer so far are computed anew, as after the death of a decode engine."""
    cluster = InProcessCluster(model, Settings(split=split))
    for name, params in PARAMS.items():
        for sample in range(params.n):
            again, expected = f"{name}/{sample}", reference[name]
            cluster.ask(again, prompt(150) + expected.tokens[sample][:after], replace(params, n=1), sample, after)
            answer = cluster.run()[again]
            assert answer.tokens == {sample: expected.tokens[sample][after:]}
            assert answer.logprobs == {sample: expected.logprobs[sample][after:]}


@pytest.mark.parametrize(("output_tokens", "n", "max_tokens"), [(-1, 1, 9), (8, 1, 9), (3, 1, 3), (3, 2, 9)])
def test_what_cannot_be_gone_on_from_is_refused(model: Path, output_tokens: int, n: int, max_tokens: int) -> None:
    cluster = InProcessCluster(model)
    cluster.ask("r", prompt(8), SamplingParams(max_tokens=max_tokens, n=n), 0, output_tokens)
    failed = cluster.run()["r"].failed
    assert failed is not None
    assert failed.code == "INVALID_ARGUMENT"


@pytest.mark.parametrize("split", [True, False], ids=["split", "colocated"])
def test_with_a_prefix_hit(model: Path, reference: dict[str, Answer], split: bool) -> None:
    cluster = InProcessCluster(model, Settings(split=split))
    cluster.ask("warm", prompt(150)[:130] + prompt(20, seed=9), GREEDY)
    cluster.run()
    for name, params in PARAMS.items():
        cluster.ask(name, prompt(150), params)
        answer = cluster.run()[name]
        assert answer.first is not None
        assert answer.first.cached_tokens >= 128
        assert_same(answer, reference[name])


@pytest.mark.parametrize("split", [True, False], ids=["split", "colocated"])
def test_with_a_prefix_that_was_in_host_memory(model: Path, reference: dict[str, Answer], split: bool) -> None:
    for host_tier in (0, 1 << 30):
        cluster = InProcessCluster(model, Settings(split=split, pages=24, host_tier=host_tier))
        cluster.ask("warm", prompt(150)[:130] + prompt(20, seed=9), GREEDY)
        cluster.run()
        for other in range(3):  # each takes all pages
            cluster.ask(f"other {other}", prompt(370, seed=20 + other), replace(GREEDY, max_tokens=8))
            cluster.run()
        for name, params in PARAMS.items():
            cluster.ask(name, prompt(150), params)
            answer = cluster.run()[name]
            assert answer.first is not None
            assert answer.first.cached_tokens == 0 if host_tier == 0 else answer.first.cached_tokens >= 128
            assert_same(answer, reference[name])
            cluster.ask(f"behind {name}", prompt(370, seed=30), replace(GREEDY, max_tokens=8))
            cluster.run()
        cluster.settle()
        assert cluster.free_pages() == [24] * len(cluster.blocks)


@pytest.mark.parametrize("split", [True, False], ids=["split", "colocated"])
def test_preempted_sequences_lose_nothing(model: Path, split: bool) -> None:
    """More sequences than pages: some are parked in host memory and come back, with the tokens they would have had."""
    params = {f"request {index}": replace(SAMPLED, seed=index, max_tokens=100) for index in range(8)}
    roomy = InProcessCluster(model, Settings(split=split))
    tight = InProcessCluster(model, Settings(split=split, pages=33))
    for name, request in params.items():
        for cluster in (roomy, tight):
            cluster.ask(name, prompt(40, seed=request.seed), request)
    expected, answers = roomy.run(), tight.run()
    assert roomy.engines[-1].stats().preemptions == 0
    assert tight.engines[-1].stats().preemptions > 0
    for name in params:
        assert answers[name].failed is None
        assert_same(answers[name], expected[name])
    tight.settle()
    assert tight.free_pages() == [33] * len(tight.blocks)
