"""A deterministic model: the same bits at any capacity, in any slot, in any company, however rows are packed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from splitserve.decode_worker.graph import DecodeGraph
from splitserve.engine.kv_cache import KvCache
from splitserve.models.config import ModelConfig
from splitserve.models.decoder import Decoder
from splitserve.models.layers import SingleRank
from splitserve.models.resolve import load_model_config
from splitserve.models.weights import load_model
from tests.tiny_model import write_tiny_moe

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
PAGE_SIZE, MAX_PAGES, STEPS = 64, 8, 6
PROMPTS = [random.Random(seed).choices(range(3, 300), k=20 + 37 * seed) for seed in range(6)]

Loaded = tuple[Decoder, ModelConfig]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder: Path = write_tiny_moe(tmp_path_factory.mktemp("latent-moe"))
    config = load_model_config(str(folder))
    arguments = (folder, config, torch.bfloat16, CUDA, SingleRank(), "auto")
    return load_model(*arguments, max_positions=512, deterministic=True), config  # type: ignore[arg-type]


def logits_of(loaded: Loaded, capacity: int, places: dict[int, int]) -> dict[int, torch.Tensor]:
    """Logits [STEPS, vocab] of each sequence; `places` maps slots to sequences, whose caches are made up alike."""
    model, config = loaded
    cache = KvCache(config.kv_layout(1, PAGE_SIZE, "bfloat16"), capacity * MAX_PAGES, CUDA)
    graph = DecodeGraph(model, config, cache, capacity, MAX_PAGES)
    sequences = graph.sequences
    sequences.lengths.zero_()
    sequences.block_table.copy_(torch.arange(capacity * MAX_PAGES, device=CUDA).view(capacity, -1).flip(0))
    for slot, sequence in places.items():
        pages = sequences.block_table[slot].long()
        for index, layer in enumerate(cache.layers):
            generator = torch.Generator(CUDA).manual_seed(sequence * 100 + index)
            layer[:, pages] = torch.randn(layer[:, pages].shape, generator=generator, device=CUDA).to(layer.dtype)
        sequences.lengths[slot] = len(PROMPTS[sequence])
        graph.tokens[slot] = PROMPTS[sequence][-1]
    seen = []
    with torch.inference_mode():
        for _ in range(STEPS):
            before = graph.tokens.clone(), sequences.lengths.clone()
            seen.append(head_logits(graph, *before))
            graph.tokens.copy_(before[0])
            sequences.lengths.copy_(before[1])
            graph.replay()
    return {sequence: torch.stack([step[slot] for step in seen]) for slot, sequence in places.items()}


def head_logits(graph: DecodeGraph, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """What a step's head gives, by running the step outside its graph."""
    caught: list[torch.Tensor] = []
    model, narrow = graph._model, graph._model.narrow_logits

    def catch(hidden: torch.Tensor) -> torch.Tensor:
        caught.append(narrow(hidden))
        return caught[-1]

    model.narrow_logits = catch  # type: ignore[method-assign]
    try:
        graph.step()
    finally:
        del model.narrow_logits
    return caught[0].clone()


def test_a_step_has_the_same_bits_anywhere(loaded: Loaded) -> None:
    alone = {sequence: logits_of(loaded, 16, {0: sequence})[sequence] for sequence in range(3)}
    for capacity, places in (
        (16, {0: 2, 1: 0, 2: 1, 3: 3}),
        (64, {0: 1, 1: 4, 2: 2, 3: 5, 4: 0}),
        (256, {slot: (slot * 5 + 3) % 6 for slot in range(6)}),
        (256, {0: 0, 1: 1, 2: 2}),
    ):
        found = logits_of(loaded, capacity, places)
        for sequence, expected in alone.items():
            assert torch.equal(found[sequence], expected), f"sequence {sequence} at capacity {capacity}"


class Itself:
    """In place of attention, which is not at stake here: every query's own first numbers."""

    def attend(
        self, q: torch.Tensor, cache_layer: torch.Tensor, scale: float, value_dim: int | None = None
    ) -> torch.Tensor:
        return q[..., :value_dim].contiguous()

    def live_rows(self, rows: int) -> torch.Tensor:
        return torch.tensor([rows], dtype=torch.int32, device=CUDA)


@torch.inference_mode()
def test_packing_changes_no_bit(loaded: Loaded) -> None:
    model, config = loaded
    cache = KvCache(config.kv_layout(1, PAGE_SIZE, "bfloat16"), 1, CUDA)
    tokens = torch.randint(3, 300, (3000,), device=CUDA)
    positions = torch.arange(3000, device=CUDA) % 512

    def run(rows: slice) -> torch.Tensor:
        nowhere = torch.full_like(tokens[rows], -1)
        hidden = model.forward(tokens[rows], positions[rows], cache.layers, Itself(), nowhere)
        return model.narrow_logits(hidden)

    expected = run(slice(0, 3000))
    for first, count in ((0, 1), (5, 16), (100, 64), (700, 256), (1000, 1500)):
        part = slice(first, first + count)
        assert torch.equal(run(part), expected[part]), f"{count} rows"
