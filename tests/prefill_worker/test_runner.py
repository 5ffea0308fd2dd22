"""The prefill runner against the `ModelRunner`: logits of chunks with and without prefixes, eager and from graphs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from splitserve.engine.batch import Batch
from splitserve.engine.kv_cache import KvCache
from splitserve.engine.runner import ModelRunner
from splitserve.kernels.gather_pages import gather_pages
from splitserve.kernels.launch import INTERPRETING
from splitserve.kernels.paged_attention import AttentionMetadata, paged_attention
from splitserve.models.layers import SingleRank
from splitserve.models.resolve import load_model_config
from splitserve.models.weights import load_model
from splitserve.prefill_worker import packed_attention
from splitserve.prefill_worker.packed_attention import PackedSequences
from splitserve.prefill_worker.packed_batch import DeviceBatch, Sizes, pack_batch
from splitserve.prefill_worker.runner import PrefillRunner
from tests.tiny_model import write_tiny_model, write_tiny_moe

DEVICE = torch.device("cpu" if INTERPRETING else "cuda")
PAGE_SIZE, PAGES = 16, 400
GRAPHS = (64, 256)
MakeRunners = Callable[[tuple[int, ...]], tuple[ModelRunner, PrefillRunner]]


class Sequences:
    """Prompts of `lengths`, each on pages of its own."""

    def __init__(self, lengths: list[int]) -> None:
        rng = random.Random(0)
        self.prompts = [rng.choices(range(3, 300), k=length) for length in lengths]
        self.pages = [rng.sample(range(PAGES), PAGES)]
        free = iter(self.pages[0])
        self.tables = [[next(free) for _ in range(-(-length // PAGE_SIZE) + 1)] for length in lengths]

    def batch(self, chunks: dict[int, tuple[int, int]], logits: int = 1) -> Batch:
        """Chunks (start, tokens) of the sequences named, with logits of the last few tokens of each."""
        return Batch(
            token_ids=[t for i, (start, count) in chunks.items() for t in self.prompts[i][start : start + count]],
            query_lens=[count for _, count in chunks.values()],
            starts=[start for start, _ in chunks.values()],
            num_logits=[min(logits, count) for _, count in chunks.values()],
            num_pages=[len(self.tables[i]) for i in chunks],
            pages=[page for i in chunks for page in self.tables[i]],
        )


@pytest.fixture(scope="module", params=["dense", "latent-moe"])
def runners(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MakeRunners:
    """Both runners of one model, each on a cache of its own."""
    write = write_tiny_model if request.param == "dense" else write_tiny_moe
    if request.param != "dense" and INTERPRETING:
        pytest.skip("on a CPU latents stay absorbed")
    folder: Path = write(tmp_path_factory.mktemp(request.param))
    config, dtype = load_model_config(str(folder)), torch.float32 if INTERPRETING else torch.bfloat16
    model = load_model(folder, config, dtype, DEVICE, SingleRank(), "auto", max_positions=1024)

    def make(graph_tokens: tuple[int, ...]) -> tuple[ModelRunner, PrefillRunner]:
        layout = config.kv_layout(1, PAGE_SIZE, "float32" if INTERPRETING else "bfloat16")
        ours, theirs = (KvCache(layout, PAGES, DEVICE) for _ in range(2))
        return ModelRunner(model, theirs, DEVICE), PrefillRunner(model, ours, DEVICE, 300, graph_tokens)

    return make


def check(pair: tuple[ModelRunner, PrefillRunner], batches: list[Batch]) -> None:
    """In bfloat16 a token may now and then take another expert, so that not quite all rows are close."""
    expected_runner, runner = pair
    distances = []
    for batch in batches:
        layers: list[int] = []
        logits, expected = runner.run(batch, layers.extend), expected_runner.run(batch)
        assert layers == list(range(len(runner.cache.layers)))
        assert logits.shape == expected.shape
        if not logits.numel():
            continue
        gap, size = (torch.linalg.vector_norm(rows, dim=-1) for rows in (logits - expected, expected))
        distances += (gap / size).tolist()
    distances.sort()
    assert distances[len(distances) * 9 // 10] <= (1e-4 if INTERPRETING else 0.04)
    assert distances[-1] <= (1e-4 if INTERPRETING else 0.3)


def test_chunks_with_prefixes(runners: MakeRunners) -> None:
    sequences = Sequences([1, 37, 90])
    batches = [
        sequences.batch({1: (0, 20), 2: (0, 33)}, logits=0),
        sequences.batch({2: (33, 57), 0: (0, 1), 1: (20, 17)}, logits=3),
    ]
    check(runners(()), batches)


def test_packing() -> None:
    batch = Sequences([40, 70, 3]).batch({1: (65, 5), 0: (0, 40)}, logits=2)
    packed = pack_batch(batch, PAGE_SIZE)
    assert packed.sizes == Sizes(tokens=45, tiles=2, pages=16)
    sizes = Sizes(tokens=51, tiles=4, pages=20)
    parts = DeviceBatch.of(packed.buffer(sizes, pinned=False), sizes)
    assert parts.live.tolist() == [45]
    assert parts.token_ids.tolist() == batch.token_ids + 6 * [0]
    assert parts.positions.tolist() == [*range(65, 70), *range(40)] + 6 * [0]
    table = batch.pages[batch.num_pages[0] :]
    assert parts.slots[5:45].tolist() == [table[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(40)]
    assert parts.slots[45:].tolist() == 6 * [-1]
    assert parts.tiles.tolist() == [[0, 5, 0, 65], [5, 40, 128, 0], 4 * [0], 4 * [0]]
    assert parts.pages[:, 1].tolist() == [16, 16, 16, 16, 6, 0, 0, 0, 16, 16, 8] + 9 * [0]
    assert parts.pages[8:11, 0].tolist() == table[:3]
    assert parts.logit_rows[:4].tolist() == [3, 4, 43, 44]


def test_expanded_latents_attend_as_absorbed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, plain, rope, value_dim, rank = 3, 16, 16, 32, 32
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences([40, 70])
    packed = pack_batch(sequences.batch({1: (11, 59), 0: (0, 40)}), PAGE_SIZE)
    batch = DeviceBatch.of(packed.buffer(packed.sizes, pinned=False), packed.sizes)
    batch = DeviceBatch(*(getattr(batch, name).to(DEVICE) for name in DeviceBatch.__dataclass_fields__))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    cache_layer = normal(1, PAGES, 1, PAGE_SIZE, rank + rope)
    q, up = normal(99, heads, plain + rope), normal(heads, plain + value_dim, rank)
    absorbed = torch.cat((torch.einsum("thp,hpr->thr", q[..., :plain], up[:, :plain]), q[..., plain:]), dim=-1)
    lens, contexts = torch.tensor([[59, 40], [70, 40]], device=DEVICE)
    tables = torch.tensor([sequences.tables[1], sequences.tables[0] + [0, 0]], device=DEVICE)
    mixed = paged_attention(absorbed, cache_layer, AttentionMetadata(lens, contexts, tables), 0.2, rank)
    expected = torch.einsum("thr,hvr->thv", mixed, up[:, plain:])
    for room in (1 << 20, 1):  # all heads at once, and one by one
        monkeypatch.setattr(packed_attention, "EXPANDED_BYTES", room)
        attended = PackedSequences(batch).attend_expanded(q, cache_layer, up, F.linear, 0.2)
        torch.testing.assert_close(attended, expected, atol=2e-4, rtol=2e-4)


def test_rows_behind_a_context_are_zero() -> None:
    packed = pack_batch(Sequences([21]).batch({0: (0, 21)}), PAGE_SIZE)
    batch = DeviceBatch.of(packed.buffer(packed.sizes, pinned=False).to(DEVICE), packed.sizes)
    layer = torch.full((1, PAGES, 1, PAGE_SIZE, 32), torch.nan, device=DEVICE)
    rows = gather_pages(layer, batch.pages)
    assert rows.shape[1] == 128
    assert not rows[:, 21:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("write", [write_tiny_model, write_tiny_moe], ids=["dense", "latent-moe"])
def test_deterministic_logits_do_not_depend_on_packing(write: Callable[[Path], Path], tmp_path: Path) -> None:
    config = load_model_config(str(write(tmp_path)))
    model = load_model(
        tmp_path, config, torch.bfloat16, DEVICE, SingleRank(), "auto", max_positions=1024, deterministic=True
    )
    cache = KvCache(config.kv_layout(1, PAGE_SIZE, "bfloat16"), PAGES, DEVICE)
    runner = PrefillRunner(model, cache, DEVICE, 1024, GRAPHS)
    sequences = Sequences([150, *(random.Random(seed).randint(1, 300) for seed in range(11))])
    alone = runner.run(sequences.batch({0: (0, 150)}, logits=20))
    for seed in range(40):
        dice = random.Random(seed)
        cut = dice.randint(0, 140)
        if cut:
            runner.run(sequences.batch({0: (0, cut)}, logits=0))
        others = {index: (0, len(sequences.prompts[index])) for index in dice.sample(range(1, 12), dice.randint(0, 11))}
        chunks = list(others.items())
        place = dice.randint(0, len(chunks))
        packed = dict([*chunks[:place], (0, (cut, 150 - cut)), *chunks[place:]])
        logits = runner.run(sequences.batch(packed, logits=10))
        first = sum(min(10, len(sequences.prompts[index])) for index, _ in chunks[:place])
        assert torch.equal(logits[first : first + 10], alone[-10:]), f"packing {seed}"


@pytest.mark.gpu
@pytest.mark.parametrize("graph_tokens", [(), GRAPHS], ids=["eager", "graphs"])
def test_many_batches(runners: MakeRunners, graph_tokens: tuple[int, ...]) -> None:
    """Graphs take the batches that they hold; the others run eagerly, in between."""
    lengths = [random.Random(seed).randint(1, 500) for seed in range(12)]
    sequences = Sequences(lengths)
    done, batches, rng = [0] * len(lengths), [], random.Random(1)
    while any(count < length for count, length in zip(done, lengths, strict=True)):
        chunks: dict[int, tuple[int, int]] = {}
        for index in rng.sample(range(len(lengths)), rng.randint(1, len(lengths))):
            if done[index] < lengths[index]:
                count = min(rng.choice([1, 17, 64, 130, 300]), lengths[index] - done[index])
                chunks[index] = (done[index], count)
                done[index] += count
        if chunks:
            batches.append(sequences.batch(chunks, logits=rng.choice([0, 1, 5])))
    check(runners(graph_tokens), batches)
