"""The captured decode step in bfloat16: the tokens of the step by step way, and the same bits whoever is beside."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from splitserve.decode_worker.device_loop import DecodeLoop, LaunchStep, RowResult
from splitserve.engine.slot_state import SlotUpdateBuilder
from splitserve.models.layers import SingleRank
from splitserve.models.resolve import load_model_config
from splitserve.models.weights import load_model
from tests.models.driver import Driver, Span
from tests.tiny_model import write_tiny_model, write_tiny_moe

pytestmark = pytest.mark.gpu
CAPACITIES, MAX_TOKENS, STEPS, COMPOSITIONS = (4, 16), 512, 16, 200
CUDA = torch.device("cuda")
GREEDY = {"top_p": 1.0, "repetition_penalty": 1.0, "logprobs": 0}


@pytest.fixture(scope="module", params=["dense", "latent-moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write = write_tiny_model if request.param == "dense" else write_tiny_moe
    return write(tmp_path_factory.mktemp(request.param))


class Decoding:
    """Up to 16 sequences in the decode loop, after a prefill the step by step way."""

    def __init__(self, folder: Path, deterministic: bool = False) -> None:
        config = load_model_config(str(folder))
        model = load_model(
            folder,
            config,
            torch.bfloat16,
            CUDA,
            SingleRank(),
            "auto",
            max_positions=MAX_TOKENS,
            deterministic=deterministic,
        )
        self.stepwise = Driver(model, config, SingleRank(), CAPACITIES[-1], MAX_TOKENS, CUDA)
        self._loop = DecodeLoop(model, config, self.stepwise.cache, CAPACITIES, MAX_TOKENS)
        self._updates = SlotUpdateBuilder(self._loop.layout)
        self._next = 0

    def start(self, prompts: dict[int, list[int]]) -> dict[int, int]:
        """Prefill the prompt of each slot, on pages that are that slot's own; returns the first tokens."""
        first: dict[int, int] = {}
        for slot in range(CAPACITIES[-1]):
            self._updates.set(slot, {"length": 0})
        for slot, prompt in prompts.items():
            first[slot] = int(self.stepwise.run([Span(slot, 0, prompt)]).argmax())
            length = {"length": len(prompt) + 1, "room": MAX_TOKENS, "last_token": first[slot]}
            self._updates.set(slot, GREEDY | length)
            self._updates.fill(slot, "block_table", self.stepwise.tables[slot].tolist())
        return first

    def step(self, capacity: int = CAPACITIES[-1]) -> dict[int, RowResult]:
        pending = self._loop.launch(LaunchStep(self._next, capacity, self._updates.take(), top=False))
        self._next += 1
        return {row.slot: row for row in pending.wait()}

    def steps(self, slot: int, capacity: int = CAPACITIES[-1]) -> list[tuple[int, float]]:
        """Tokens and log probabilities that come in `slot`."""
        rows = [self.step(capacity)[slot] for _ in range(STEPS)]
        return [(row.token_id, row.logprob) for row in rows]


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=length)


def test_tokens_are_those_of_the_step_by_step_way(folder: Path) -> None:
    decoding = Decoding(folder)
    prompts = {slot: prompt(length, seed=length) for slot, length in enumerate((5, 70, 200))}
    last = decoding.start(prompts)
    differing = 0
    for step in range(STEPS):
        spans = [Span(slot, len(prompts[slot]) + step, [last[slot]]) for slot in prompts]
        last = {slot: row.token_id for slot, row in decoding.step(CAPACITIES[step % 2]).items()}
        logits = decoding.stepwise.run(spans)
        chosen = torch.tensor([[last[slot]] for slot in prompts], device=CUDA)
        behind = logits.amax(-1) - logits.gather(1, chosen)[:, 0]
        assert behind.max() < 0.15 * logits.std(), "not even close to the best token"
        differing += int((behind > 0).sum())
    assert differing <= 3


def test_neighbours_change_no_bit(folder: Path) -> None:
    """In the same slot, beside any other sequences, at one capacity."""
    decoding = Decoding(folder)
    mine = prompt(100, seed=0)
    decoding.start({0: mine})
    alone = decoding.steps(0)
    assert len(set(alone)) > 3
    for seed in range(COMPOSITIONS):
        dice = random.Random(seed)
        others = dice.sample(range(1, CAPACITIES[-1]), dice.randint(1, CAPACITIES[-1] - 1))
        beside = {slot: prompt(dice.randint(1, 300), seed=seed * 100 + slot) for slot in others}
        decoding.start({0: mine} | beside)
        assert decoding.steps(0) == alone, f"composition {seed}"


def test_deterministic_bits_depend_on_nothing(folder: Path) -> None:
    """In any slot, at any capacity, alone or among others."""
    decoding = Decoding(folder, deterministic=True)
    mine = prompt(100, seed=0)
    decoding.start({0: mine})
    alone = decoding.steps(0)
    assert len(set(alone)) > 3
    for seed in range(COMPOSITIONS):
        dice = random.Random(seed)
        capacity = dice.choice(CAPACITIES)
        slots = dice.sample(range(CAPACITIES[-1]), dice.randint(1, capacity))
        lengths = {slot: dice.randint(1, 300) for slot in slots[1:]}
        beside = {slot: prompt(length, seed=seed * 100 + slot) for slot, length in lengths.items()}
        decoding.start({slots[0]: mine} | beside)
        assert decoding.steps(slots[0], capacity) == alone, f"composition {seed}"
