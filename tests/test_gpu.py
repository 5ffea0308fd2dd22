"""The cluster on a GPU, through torch operations: the tokens of the CPU, split and colocated."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from splitserve.client import Sampling
from tests.worker_threads import running, topology

pytestmark = pytest.mark.gpu

PROMPTS = [random.Random(seed).choices(range(3, 300), k=length) for seed, length in enumerate((5, 70, 200, 600))]
GREEDY = Sampling(max_tokens=24, ignore_eos=True)
SAMPLED = Sampling(max_tokens=24, ignore_eos=True, temperature=0.8, top_p=0.9, seed=11)


def answers(folder: Path, **settings: Any) -> list[tuple[int, ...]]:
    with running(topology(folder, **settings)) as client:
        streams = [client.generate(prompt, **sampling) for prompt in PROMPTS for sampling in (GREEDY, SAMPLED)]
        return [stream.result().samples[0].token_ids for stream in streams]


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> list[tuple[int, ...]]:
    return answers(tiny_model)


def test_split(tiny_model: Path, expected: list[tuple[int, ...]]) -> None:
    assert answers(tiny_model, device="cuda") == expected


def test_colocated(tiny_model: Path, expected: list[tuple[int, ...]]) -> None:
    pool = {"device": "cuda", "kv_memory": "64MiB", "page_size": 64, "chunk_tokens": 128}
    assert answers(tiny_model, device="cuda", colocated=True, prefill=None, decode=pool) == expected
