"""The captured decode step on a GPU: the tokens of the step by step way, and the same ones whoever is beside."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from splitserve.decode_worker.graph import DecodeGraph
from splitserve.models.layers import SingleRank
from splitserve.models.resolve import load_model_config
from splitserve.models.weights import load_model
from tests.models.driver import PAGE_SIZE, Driver, Span
from tests.tiny_model import write_tiny_model, write_tiny_moe

pytestmark = pytest.mark.gpu
SLOTS, MAX_TOKENS, STEPS = 16, 512, 16
CUDA = torch.device("cuda")


@pytest.fixture(scope="module", params=["dense", "latent-moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write = write_tiny_model if request.param == "dense" else write_tiny_moe
    return write(tmp_path_factory.mktemp(request.param))


class Decoding:
    """Up to SLOTS sequences in one graph, after a prefill the step by step way."""

    def __init__(self, folder: Path) -> None:
        config = load_model_config(str(folder))
        model = load_model(folder, config, torch.bfloat16, CUDA, SingleRank(), "auto", max_positions=MAX_TOKENS)
        self.stepwise = Driver(model, config, SingleRank(), SLOTS, MAX_TOKENS, CUDA)
        self.graph = DecodeGraph(model, config, self.stepwise.cache, SLOTS, MAX_TOKENS // PAGE_SIZE)

    def start(self, prompts: list[list[int]], places: list[int]) -> None:
        """Prefill `prompts` and put each into its slot of `places`; a slot's pages are its own."""
        sequences = self.graph.sequences
        sequences.lengths.zero_()
        sequences.block_table.copy_(self.stepwise.tables)
        for place, prompt in zip(places, prompts, strict=True):
            first = self.stepwise.run([Span(place, 0, prompt)]).argmax()
            self.graph.tokens[place] = first
            sequences.lengths[place] = len(prompt) + 1

    def steps(self, place: int) -> list[int]:
        """The tokens that come in slot `place`."""
        tokens = []
        for _ in range(STEPS):
            self.graph.replay()
            tokens.append(int(self.graph.tokens[place]))
        return tokens


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=length)


def test_tokens_are_those_of_the_step_by_step_way(folder: Path) -> None:
    decoding = Decoding(folder)
    prompts = [prompt(length, seed=length) for length in (5, 70, 200)]
    decoding.start(prompts, [0, 1, 2])
    differing = 0
    for step in range(STEPS):
        before = decoding.graph.tokens.tolist()
        decoding.graph.replay()
        spans = [Span(place, len(prompts[place]) + step, [before[place]]) for place in range(3)]
        logits = decoding.stepwise.run(spans)
        chosen = decoding.graph.tokens[:3]
        behind = logits.amax(-1) - logits.gather(1, chosen[:, None])[:, 0]
        assert behind.max() < 0.15 * logits.std(), "not even close to the best token"
        differing += int((behind > 0).sum())
    assert differing <= 3


def test_neighbours_change_no_token(folder: Path) -> None:
    """In the same slot, beside any other sequences, at one capacity."""
    decoding = Decoding(folder)
    mine = prompt(100, seed=0)
    decoding.start([mine], [0])
    alone = decoding.steps(0)
    assert len(set(alone)) > 3
    for seed in range(8):
        others = random.Random(seed).randint(1, SLOTS - 1)
        lengths = [random.Random(seed * 100 + place).randint(1, 300) for place in range(others)]
        beside = [prompt(length, seed=seed * 100 + place + 1) for place, length in enumerate(lengths)]
        decoding.start([mine, *beside], list(range(others + 1)))
        assert decoding.steps(0) == alone, f"composition {seed}"
