"""Decode attention over pages against float64, and to the bit against itself in other company."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch

from splitserve.kernels.decode_attention import decode_attention, decode_attention_reference
from splitserve.kernels.decode_plan import (
    DecodeShape,
    DecodeTiles,
    SplitTable,
    choose_tiles,
    new_decode_plan,
    new_decode_scratch,
    plan_decode,
    plan_reference,
)

SPLITS = SplitTable(front_step=32, front=64, step=64)
ROWS_FIRST = DecodeTiles(block_keys=32, splits=SPLITS)
KEYS_FIRST = replace(ROWS_FIRST, keys_first=True)
IN_PARTS = replace(ROWS_FIRST, parts=2)
COMBINED = replace(IN_PARTS, combine=True)
LENGTHS = [5, 0, 194, 65, 0, 32]  # 194 in four pieces: one is empty

SHAPES = [
    DecodeShape(9, 3, 64, 64, 16),
    DecodeShape(4, 4, 32, 32, 32),
    DecodeShape(2, 1, 16, 16, 64, q_len=3),
    DecodeShape(4, 2, 32, 32, 16, q_len=4),
    DecodeShape(5, 1, 80, 64, 16),
    DecodeShape(10, 1, 48, 32, 64, q_len=2),
]
REAL_SHAPES = [
    DecodeShape(16, 1, 576, 512, 64),
    DecodeShape(16, 1, 576, 512, 16),
    DecodeShape(16, 1, 576, 512, 128, q_len=2),
    DecodeShape(128, 1, 576, 512, 64),
    DecodeShape(32, 8, 128, 128, 64),
    DecodeShape(32, 8, 128, 128, 16, q_len=4),
    DecodeShape(28, 4, 128, 128, 32),
    DecodeShape(9, 3, 64, 64, 16),
    DecodeShape(32, 32, 128, 128, 64),
    DecodeShape(32, 1, 128, 128, 64),
]


@dataclass(frozen=True)
class Batch:
    """Queries, and pages that hold NaN wherever no slot has a token."""

    shape: DecodeShape
    q: torch.Tensor
    layer: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor

    @property
    def scale(self) -> float:
        return float(self.shape.dim**-0.5)

    @property
    def value_dim(self) -> int | None:
        return self.shape.value_dim if self.shape.latent else None

    def pick(self, slots: list[int], max_pages: int | None = None) -> Batch:
        """These slots, in this order, with room for `max_pages` pages each."""
        width = max_pages or self.table.shape[1]
        table = self.table.new_full((len(slots), width), len(self.layer[0]) - 1)
        kept = min(width, self.table.shape[1])
        table[:, :kept] = self.table[slots, :kept]
        return replace(self, q=self.q[slots], table=table, lengths=self.lengths[slots])

    def run(self, tiles: DecodeTiles, wave: int) -> torch.Tensor:
        slots, device = len(self.q), self.q.device
        plan = new_decode_plan(slots, wave, tiles.splits, device)
        scratch = new_decode_scratch(self.shape, tiles, slots, int(self.lengths.sum()), device)
        scratch.acc.fill_(torch.nan)
        scratch.stats.fill_(torch.nan)
        plan_decode(self.lengths, plan)
        return decode_attention(
            self.q, self.layer, self.table, self.lengths, self.scale, plan, scratch, tiles, value_dim=self.value_dim
        )

    def reference(self) -> torch.Tensor:
        return decode_attention_reference(
            self.q, self.layer, self.table, self.lengths, self.scale, value_dim=self.value_dim
        )


def random_batch(
    shape: DecodeShape, lengths: list[int], device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Batch:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    needed = [-(-length // shape.page_size) for length in lengths]
    pages = sum(needed) + 1
    order = torch.randperm(pages - 1, generator=torch.Generator().manual_seed(seed)).to(device, torch.int32)
    planes = 1 if shape.latent else 2
    layer = torch.full((planes, pages, shape.kv_heads, shape.page_size, shape.dim), torch.nan, device=device).to(dtype)
    table = torch.full((len(lengths), max(needed)), pages - 1, dtype=torch.int32, device=device)
    for row, length, own in zip(table, lengths, torch.split(order, needed), strict=True):
        row[: len(own)] = own
        for index, page in enumerate(own.tolist()):
            tokens = min(shape.page_size, length - index * shape.page_size)
            layer[:, page, :, :tokens] = normal(planes, shape.kv_heads, tokens, shape.dim)
    q = normal(len(lengths), shape.q_len, shape.heads, shape.dim)
    return Batch(shape, q, layer, table, torch.tensor(lengths, dtype=torch.int32, device=device))


@pytest.mark.parametrize(
    "tiles", [ROWS_FIRST, KEYS_FIRST, IN_PARTS, COMBINED], ids=["rows", "keys", "parts", "combined"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape: DecodeShape, tiles: DecodeTiles) -> None:
    batch = random_batch(shape, LENGTHS)
    result = batch.run(tiles, wave=9)
    assert not result[[1, 4]].any()
    torch.testing.assert_close(result.double(), batch.reference(), atol=2e-6, rtol=1e-5)


def test_bfloat16_is_computed_in_float32() -> None:
    batch = random_batch(SHAPES[0], LENGTHS, dtype=torch.bfloat16)
    result = batch.run(ROWS_FIRST, wave=6)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), batch.reference(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("tiles", [ROWS_FIRST, KEYS_FIRST], ids=["rows", "keys"])
@pytest.mark.parametrize("shape", [replace(SHAPES[3], q_len=2), SHAPES[4]], ids=str)
def test_bits_depend_on_nothing_but_the_own_context(shape: DecodeShape, tiles: DecodeTiles) -> None:
    batch = random_batch(shape, LENGTHS)
    expected = batch.run(tiles, wave=len(LENGTHS))
    for wave in (1, 4, 9):
        for combine in (False, True):
            assert torch.equal(batch.run(replace(tiles, combine=combine), wave), expected)
    for slot in (2, 5):
        assert torch.equal(batch.pick([slot]).run(tiles, 4), expected[[slot]])
    order = [5, 3, 2, 1]
    assert torch.equal(batch.pick(order, max_pages=40).run(tiles, 4), expected[order])


def test_an_idle_batch() -> None:
    batch = random_batch(SHAPES[0], [40, 70]).pick([0, 1])
    batch.lengths.zero_()
    assert not batch.run(ROWS_FIRST, wave=4).any()


TABLES = [SPLITS, SplitTable(), SplitTable(64, 0, 64), SplitTable(128, 2048, 1024)]


def check_plan(slots: int, wave: int, splits: SplitTable, device: str = "cpu") -> None:
    rng = random.Random(slots * wave)
    lengths = [rng.choice([0, 1, rng.randint(1, 5000)]) for _ in range(slots)]
    plan = new_decode_plan(slots, wave, splits, torch.device(device))
    plan_decode(torch.tensor(lengths, dtype=torch.int32, device=device), plan)
    pieces, slot_plans = plan_reference(lengths, wave, splits)
    assert plan.pieces.tolist() == pieces
    assert plan.slots.tolist() == slot_plans
    assert all(folded > 0 for _, folded, number in slot_plans if number)
    assert all(first <= end for _, first, end, _ in pieces)


@pytest.mark.parametrize("splits", TABLES, ids=str)
def test_plans(splits: SplitTable) -> None:
    for slots, wave in ((1, 1), (1, 9), (3, 20), (13, 13), (5, 17), (19, 6)):
        check_plan(slots, wave, splits)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", TABLES, ids=str)
def test_large_plans(splits: SplitTable) -> None:
    for slots, wave in ((3, 132), (33, 132), (256, 264), (256, 132), (200, 7), (512, 132)):
        check_plan(slots, wave, splits, "cuda")


@pytest.mark.parametrize(("lengths", "pieces"), [([1060] * 13, 13), ([1060] * 14, 14), ([8000, *[500] * 13], 28)])
def test_a_second_wave_is_not_begun_in_vain(lengths: list[int], pieces: int) -> None:
    plan = new_decode_plan(26, 14, SplitTable(512, 0, 512), torch.device("cpu"))
    plan_decode(torch.tensor([*lengths, *[0] * (26 - len(lengths))], dtype=torch.int32), plan)
    assert int((plan.pieces[:, 0] >= 0).sum()) == pieces


def test_split_tables_must_nest() -> None:
    assert [SplitTable(128, 512, 256).count(tokens) for tokens in (0, 1, 128, 129, 512, 513, 768, 769)] == [
        0, 1, 1, 2, 4, 5, 5, 6,
    ]  # fmt: skip
    for sizes in ((96, 960, 192), (128, 1024, 64), (128, 384, 256)):
        with pytest.raises(ValueError, match="powers of two"):
            SplitTable(*sizes)


def test_shapes_that_do_not_fit_are_refused() -> None:
    batch = random_batch(SHAPES[0], [40])
    for broken, message in (
        (replace(batch, q=batch.q[..., :32].contiguous()), "does not fit"),
        (replace(batch, q=torch.cat((batch.q, batch.q), -1)[..., :64]), "contiguous"),
        (replace(batch, table=batch.table.long()), "int32"),
        (replace(batch, table=batch.table.repeat(2, 1)), "1 slots"),
    ):
        with pytest.raises(ValueError, match=message):
            broken.run(ROWS_FIRST, wave=1)
    with pytest.raises(ValueError, match="do not fit the plan"):
        batch.run(replace(ROWS_FIRST, block_keys=64), wave=1)


def random_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.choice([0, rng.randint(8, 200), rng.randint(8, longest)]) for _ in range(count)]


def wave_of(shape: DecodeShape, tiles: DecodeTiles) -> int:
    return tiles.wave(shape, torch.cuda.get_device_properties().multi_processor_count)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_real_shapes(shape: DecodeShape) -> None:
    tiles = choose_tiles(shape, 64)
    batch = random_batch(shape, [8, 0, 4099, 1024, 1025, 300, 64], "cuda", torch.bfloat16)
    result = batch.run(tiles, wave_of(shape, tiles))
    torch.testing.assert_close(result.double(), batch.reference(), atol=4e-3, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_a_slot_among_255_others_has_the_bits_it_has_alone(shape: DecodeShape) -> None:
    tiles = choose_tiles(shape, 64)
    batch = random_batch(shape, [*random_lengths(255, 1500), 2500], "cuda", torch.bfloat16)
    expected = batch.run(tiles, wave_of(shape, tiles))
    live = [slot for slot, length in enumerate(batch.lengths.tolist()) if length]
    for slot in (live[0], live[len(live) // 2], live[-1]):
        for capacity in (None, 200, 700):
            alone = batch.pick([slot], capacity)
            assert torch.equal(alone.run(tiles, wave_of(shape, tiles)), expected[[slot]])
    order = random.Random(1).sample(range(256), 256)
    assert torch.equal(batch.pick(order).run(tiles, wave_of(shape, tiles)), expected[order])
    assert torch.equal(batch.run(replace(tiles, combine=not tiles.combine), 700), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [REAL_SHAPES[0], REAL_SHAPES[4]], ids=str)
@pytest.mark.parametrize("q_len", [2, 4])
def test_drafts_change_no_bit(shape: DecodeShape, q_len: int) -> None:
    drafted = replace(shape, q_len=q_len)
    tiles = choose_tiles(drafted, 64)
    batch = random_batch(drafted, [8, 130, 257, 1024, 1030, 2500], "cuda", torch.bfloat16)
    expected = batch.run(tiles, wave_of(drafted, tiles))
    for query in range(q_len):
        single = replace(
            batch,
            shape=shape,
            q=batch.q[:, query : query + 1].contiguous(),
            lengths=batch.lengths - (q_len - 1 - query),
        )
        one = choose_tiles(shape, 64)
        assert torch.equal(single.run(one, wave_of(shape, one)), expected[:, query : query + 1])


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_one_graph_serves_any_lengths(pdl: bool) -> None:
    shape = REAL_SHAPES[0]
    tiles = replace(choose_tiles(shape, 64), pdl=pdl)
    batch = random_batch(shape, [2000] * 12, "cuda", torch.bfloat16)
    wave = wave_of(shape, tiles)
    plan = new_decode_plan(12, wave, tiles.splits, batch.q.device)
    scratch = new_decode_scratch(shape, tiles, 12, 12 * 2000, batch.q.device)
    lengths, out = batch.lengths.clone(), torch.empty_like(batch.q[..., : shape.value_dim])

    def step() -> None:
        plan_decode(lengths, plan)
        q = batch.q.clone()  # with pdl, the plan must be there before the kernel in front starts
        decode_attention(
            q, batch.layer, batch.table, lengths, batch.scale, plan, scratch, tiles,
            value_dim=shape.value_dim, out=out,
        )  # fmt: skip

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(4):
        rng = random.Random(seed)
        live = [rng.choice([0, 1, 77, 1024, rng.randint(1, 2000)]) for _ in range(12)]
        lengths.copy_(torch.tensor(live, dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, replace(batch, lengths=lengths.clone()).run(tiles, wave))
