"""Attention of packed chunks against float64, and to the bit against itself in other packings and chunks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from splitserve.kernels.gather_pages import gather_pages, gather_pages_reference
from splitserve.kernels.launch import INTERPRETING
from splitserve.kernels.prefill_attention import (
    KEY_TILE,
    PrefillTiles,
    prefill_attention,
    prefill_attention_reference,
    query_tiles,
)

DEVICE = "cpu" if INTERPRETING else "cuda"
SMALL = PrefillTiles(32, 4, 1)
Lens = list[tuple[int, int]]  # (first position, queries) of each chunk


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    rest: int
    value_dim: int


SHAPES = [Shape(4, 2, 32, 0, 32), Shape(3, 1, 16, 0, 16), Shape(2, 2, 32, 16, 16), Shape(2, 2, 16, 32, 64)]
REAL_SHAPES = [Shape(16, 16, 128, 64, 128), Shape(32, 8, 128, 0, 128), Shape(9, 3, 64, 0, 64), Shape(4, 4, 16, 16, 16)]


class Context:
    """Sequences of `lengths` tokens: queries, and keys and values in rows padded with numbers that nobody sees."""

    def __init__(self, shape: Shape, lengths: list[int], dtype: torch.dtype) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.lengths = lengths
        padded = [-(-length // KEY_TILE) * KEY_TILE for length in lengths]
        self.rows = [sum(padded[:index]) for index in range(len(padded))]

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=DEVICE).to(dtype)

        self.q = [normal(length, shape.heads, shape.dim + shape.rest) for length in lengths]
        both = normal(sum(padded), shape.kv_heads, shape.dim + shape.value_dim)
        self.keys, self.values = torch.split(both, [shape.dim, shape.value_dim], dim=-1)
        self.rope_keys = normal(sum(padded), 8 + shape.rest)[:, 8:] if shape.rest else None
        self.scale = float((shape.dim + shape.rest) ** -0.5)

    def tiles(self, chunks: dict[int, tuple[int, int]]) -> torch.Tensor:
        lens, starts = [count for _, count in chunks.values()], [start for start, _ in chunks.values()]
        return torch.from_numpy(query_tiles(lens, starts, [self.rows[index] for index in chunks])).to(DEVICE)

    def run(self, chunks: dict[int, tuple[int, int]], config: PrefillTiles | None = None) -> list[torch.Tensor]:
        """The result of each chunk (start, queries) of the sequences that `chunks` names, packed in that order."""
        q = torch.cat([self.q[index][start : start + count] for index, (start, count) in chunks.items()])
        tiles = torch.cat((self.tiles(chunks), torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)))
        out = prefill_attention(q, self.keys, self.values, tiles, self.scale, rope_keys=self.rope_keys, config=config)
        return list(torch.split(out, [count for _, count in chunks.values()]))

    def reference(self, chunks: dict[int, tuple[int, int]]) -> list[torch.Tensor]:
        q = torch.cat([self.q[index][start : start + count] for index, (start, count) in chunks.items()])
        out = prefill_attention_reference(q, self.keys, self.values, self.tiles(chunks), self.scale, self.rope_keys)
        return list(torch.split(out, [count for _, count in chunks.values()]))


def chunked(length: int, cuts: list[int]) -> Lens:
    return [(start, stop - start) for start, stop in pairwise([0, *cuts, length])]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape: Shape) -> None:
    context = Context(shape, [5, 140, 65, 33], torch.float32)
    chunks = {2: (0, 65), 0: (4, 1), 1: (3, 137), 3: (32, 1)}
    for result, expected in zip(context.run(chunks, SMALL), context.reference(chunks), strict=True):
        torch.testing.assert_close(result.double(), expected, atol=2e-6, rtol=1e-5)


def test_bfloat16_is_computed_in_float32() -> None:
    context = Context(SHAPES[0], [40, 70], torch.bfloat16)
    chunks = {0: (0, 40), 1: (11, 59)}
    for result, expected in zip(context.run(chunks, SMALL), context.reference(chunks), strict=True):
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.double(), expected, atol=1e-2, rtol=1e-2)


def test_bits_depend_on_nothing_but_the_own_context() -> None:
    context = Context(SHAPES[2], [150, 9], torch.float32)
    expected = context.run({0: (0, 150)}, SMALL)[0]
    # Cut between tiles of queries: the interpreter's products, unlike a GPU's, depend on a row's place among others.
    parts = [context.run({0: chunk}, SMALL)[0] for chunk in chunked(150, [128])]
    assert torch.equal(torch.cat(parts), expected)
    assert torch.equal(context.run({1: (0, 9), 0: (0, 150)}, SMALL)[1], expected)


def test_tiles_list_the_longest_contexts_first() -> None:
    assert query_tiles([200, 1, 130], [0, 500, 64], [0, 256, 1024]).tolist() == [
        [200, 1, 256, 500],
        [128, 72, 0, 128],
        [329, 2, 1024, 192],
        [201, 128, 1024, 64],
        [0, 128, 0, 0],
    ]


def test_shapes_that_do_not_fit_are_refused() -> None:
    context = Context(SHAPES[0], [40], torch.float32)
    tiles = context.tiles({0: (0, 40)})
    q, keys, values = context.q[0], context.keys, context.values
    for broken, message in (
        ((q[..., :16], keys, values, tiles), "do not fit"),
        ((q[:, :3], keys, values, tiles), "do not fit"),
        ((q[..., :24], keys[..., :24], values, tiles), "powers of two"),
        ((q, keys, values, tiles.int()), "int64"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill_attention(*broken, scale=1.0)


@pytest.mark.parametrize(("planes", "heads", "page_size", "dim"), [(2, 3, 16, 32), (1, 1, 32, 48)])
def test_gathering(planes: int, heads: int, page_size: int, dim: int) -> None:
    layer = torch.randn(planes, 7, heads, page_size, dim, device=DEVICE)
    layer[:, 2] = torch.nan
    pages = torch.tensor([[3, page_size], [6, 5], [2, 0], [1, page_size]], device=DEVICE)
    assert torch.equal(gather_pages(layer, pages), gather_pages_reference(layer, pages))


def random_chunks(lengths: list[int], seed: int) -> dict[int, tuple[int, int]]:
    rng = random.Random(seed)
    order = rng.sample(range(len(lengths)), len(lengths))
    starts = {index: rng.choice([0, lengths[index] - 1, rng.randrange(lengths[index])]) for index in order}
    return {index: (start, lengths[index] - start) for index, start in starts.items()}


LENGTHS = [1, 8, 127, 128, 129, 300, 1024, 1500, 2049, 77, 640]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_real_shapes(shape: Shape, dtype: torch.dtype) -> None:
    context = Context(shape, LENGTHS, dtype)
    tolerance = 6e-3 if dtype == torch.bfloat16 else 1e-5
    for seed in range(3):
        chunks = random_chunks(LENGTHS, seed)
        for result, expected in zip(context.run(chunks), context.reference(chunks), strict=True):
            torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=2 * tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_bits_on_a_gpu(shape: Shape) -> None:
    context = Context(shape, LENGTHS, torch.bfloat16)
    expected = [context.run({index: (0, length)})[0] for index, length in enumerate(LENGTHS)]
    for seed in range(6):
        chunks = random_chunks(LENGTHS, seed)
        for (index, (start, _)), result in zip(chunks.items(), context.run(chunks), strict=True):
            assert torch.equal(result, expected[index][start:])
    for cuts in ([1, 2, 3, 700], [128, 256, 1024], [37, 1500, 2048]):
        parts = [context.run({8: chunk})[0] for chunk in chunked(LENGTHS[8], cuts)]
        assert torch.equal(torch.cat(parts), expected[8])
