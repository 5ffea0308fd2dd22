"""The same request gives the same tokens, from the same logits to the bit, whatever runs beside it and however.

A tiny random model in float32. What one request answers alone, in one chunk and on pages of 16 is compared with what
it answers under every other circumstance.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from splitserve.cluster.sampling import SamplingParams
from splitserve.engine.batch import Batch
from splitserve.engine.group import FollowerLink, GlooGroup, LeaderLink, host_store, join_store
from splitserve.engine.host_tier import HostTier
from splitserve.engine.runner import ModelRunner
from splitserve.models.layers import SingleRank
from tests.engine.loop import Live, Loop, Request, RunBatch, make_runner
from tests.tiny_model import write_tiny_model

ADDRESS = "127.0.0.1"
TIMEOUT_S = 60.0
MODES = {
    "greedy": SamplingParams(max_tokens=24, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.9, top_k=50, top_p=0.95, seed=1234),
}
PROMPT = [3 + (7 * i * i + i) % 290 for i in range(201)]

modes = pytest.mark.parametrize("mode", MODES)
page_sizes = pytest.mark.parametrize("page_size", [16, 64])
chunks = pytest.mark.parametrize("chunk_tokens", [16, 64, 512])
Runners = Callable[[int], ModelRunner]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def runners(folder: Path) -> Runners:
    """Runners by page size. Their caches keep what earlier tests wrote, as a worker's do."""
    made: dict[int, ModelRunner] = {}

    def runner(page_size: int) -> ModelRunner:
        if page_size not in made:
            made[page_size] = make_runner(folder, page_size, SingleRank())
        return made[page_size]

    return runner


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Live]:
    """The request alone, in one chunk, on fresh pages of 16."""
    runner = make_runner(folder, 16, SingleRank())
    return {mode: Loop(runner.run, 16).answer([(PROMPT, params)])[0] for mode, params in MODES.items()}


def assert_same(found: Live, expected: Live) -> None:
    assert found.tokens == expected.tokens
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


def random_requests(seed: int, count: int) -> list[Request]:
    rng = random.Random(seed)
    requests = []
    for _ in range(count):
        params = SamplingParams(
            max_tokens=rng.randrange(1, 30), ignore_eos=True, temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(99)
        )
        requests.append(([rng.randrange(3, 300) for _ in range(rng.randrange(1, 300))], params))
    return requests


def among_neighbours(run: RunBatch, page_size: int, chunk_tokens: int, mode: str, seed: int) -> Live:
    """The request in a random place among 30 others."""
    requests = random_requests(seed, 30)
    place = random.Random(seed).randrange(31)
    requests.insert(place, (PROMPT, MODES[mode]))
    return Loop(run, page_size).answer(requests, chunk_tokens)[place]


@modes
@page_sizes
@chunks
def test_alone(runners: Runners, expected: dict[str, Live], mode: str, page_size: int, chunk_tokens: int) -> None:
    (found,) = Loop(runners(page_size).run, page_size).answer([(PROMPT, MODES[mode])], chunk_tokens)
    assert_same(found, expected[mode])


@modes
@page_sizes
@chunks
def test_among_neighbours(
    runners: Runners, expected: dict[str, Live], mode: str, page_size: int, chunk_tokens: int
) -> None:
    found = among_neighbours(runners(page_size).run, page_size, chunk_tokens, mode, seed=page_size + chunk_tokens)
    assert_same(found, expected[mode])


@modes
@page_sizes
@pytest.mark.parametrize("shared_tokens", [63, 64, 130, 201])
def test_with_a_prefix_hit(
    runners: Runners, expected: dict[str, Live], mode: str, page_size: int, shared_tokens: int
) -> None:
    loop = Loop(runners(page_size).run, page_size)
    loop.answer([([*PROMPT[:shared_tokens], 5, 6, 7], MODES["sampled"])])
    found = loop.answer([(PROMPT, MODES[mode])])[0]
    assert found.table.cached_tokens == min(shared_tokens, len(PROMPT) - 1) // page_size * page_size
    assert_same(found, expected[mode])


@modes
@page_sizes
def test_parked_and_restored_elsewhere(runners: Runners, expected: dict[str, Live], mode: str, page_size: int) -> None:
    runner = runners(page_size)
    tier = HostTier(runner.cache)
    loop = Loop(runner.run, page_size)
    found = loop.start(PROMPT, MODES[mode])
    for _ in range(9):
        loop.step([found])
    old_pages = found.table.pages
    tier.move([(page, place) for place, page in enumerate(old_pages)], ())
    loop.blocks.free(found.table)
    loop.answer(random_requests(3, 60))
    table = loop.blocks.allocate(found.sequence.token_ids, ("not the cached pages",))
    assert table is not None
    assert set(table.pages) != set(old_pages)
    found.sequence.table = found.table = table
    tier.move((), list(enumerate(table.pages[: len(old_pages)])))
    while found.sequence.finish_reason is None:
        loop.step([found])
    assert_same(found, expected[mode])


@modes
def test_a_fork_goes_on_as_its_parent_would(runners: Runners, expected: dict[str, Live], mode: str) -> None:
    runner = runners(16)
    loop = Loop(runner.run, 16)
    parent = loop.start(PROMPT, MODES[mode])
    loop.step([parent])
    forked = loop.blocks.fork(parent.table, parent.sequence.computed_tokens)
    assert forked is not None
    table, copies = forked
    assert len(copies) == 1
    runner.copy_pages(copies)
    other = SamplingParams(max_tokens=24, ignore_eos=True, temperature=2.0, seed=99)
    child = loop.start(PROMPT, MODES[mode])
    loop.blocks.free(child.table)
    child.sequence.table = child.table = table
    child.sequence.computed_tokens = parent.sequence.computed_tokens
    child.logits += parent.logits
    child.sequence.take(parent.tokens[0])
    parent.sequence.params = other
    while child.sequence.finish_reason is None:
        loop.step([parent, child])
    assert parent.tokens != child.tokens
    assert_same(child, expected[mode])


def follow(folder: Path, command_address: str, store_address: str) -> None:
    """TP rank 1, in a process of its own, until its leader says nothing for a while."""
    torch.set_num_threads(1)
    link = FollowerLink(command_address, 1)
    group = GlooGroup(join_store(store_address, TIMEOUT_S), 1, 2, ADDRESS, TIMEOUT_S)
    runner = make_runner(folder, 16, group)
    while isinstance(batch := link.receive(TIMEOUT_S), Batch) and batch.token_ids:
        runner.run(batch)


@pytest.fixture(scope="module")
def tp2_run(folder: Path) -> Iterator[RunBatch]:
    """Runs batches on two ranks, the second of which is another process. An empty batch ends it."""
    link = LeaderLink(1, ADDRESS)
    store, store_address = host_store(ADDRESS, TIMEOUT_S)
    follower = multiprocessing.get_context("spawn").Process(target=follow, args=(folder, link.address, store_address))
    follower.start()
    link.wait_for_followers(TIMEOUT_S)
    runner = make_runner(folder, 16, GlooGroup(store, 0, 2, ADDRESS, TIMEOUT_S))

    def run(batch: Batch) -> torch.Tensor:
        link.send(batch)
        return runner.run(batch)

    yield run
    link.send(Batch([], [], [], [], [], []))
    follower.join(TIMEOUT_S)
    link.close()
    assert follower.exitcode == 0


@modes
def test_two_ranks_answer_as_one(tp2_run: RunBatch, expected: dict[str, Live], mode: str) -> None:
    (found,) = Loop(tp2_run, 16).answer([(PROMPT, MODES[mode])])
    assert found.tokens == expected[mode].tokens
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected[mode].logits), rtol=1e-4, atol=1e-4)


def test_two_ranks_among_neighbours_answer_as_alone(tp2_run: RunBatch) -> None:
    (alone,) = Loop(tp2_run, 16).answer([(PROMPT, MODES["sampled"])])
    assert_same(among_neighbours(tp2_run, 16, 64, "sampled", seed=5), alone)
