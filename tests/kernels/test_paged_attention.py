"""Paged attention against a dense reference in float64, and to the bit against itself under other circumstances."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from splitserve.kernels.kv_write import write_kv
from splitserve.kernels.paged_attention import AttentionMetadata, paged_attention

SHAPES = [(9, 3, 64), (4, 2, 16), (4, 4, 32), (8, 1, 48), (2, 1, 128), (12, 2, 80)]
PAGE_SIZES = [16, 32, 64, 128]

shapes = pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)


@dataclass(frozen=True)
class Text:
    """One sequence's vectors [tokens, heads, dim]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def __len__(self) -> int:
        return len(self.q)

    def to(self, dtype: torch.dtype) -> Text:
        return Text(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype))


def random_text(seed: int, length: int, heads: int, kv_heads: int, dim: int) -> Text:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(length, count, dim, generator=generator) for count in (heads, kv_heads, kv_heads))
    return Text(q * 2, k, v)


def dense(text: Text) -> torch.Tensor:
    """Causal attention of a whole text, in float64."""
    group = text.q.shape[1] // text.k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (text.q, text.k, text.v))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.transpose(1, 2) * text.q.shape[-1] ** -0.5
    scores += torch.full_like(scores, -torch.inf).triu(1)
    attended: torch.Tensor = scores.softmax(-1) @ v
    return attended.transpose(0, 1)


class Pages:
    """Texts in one layer's pages, which hold NaN wherever nothing was written."""

    def __init__(self, texts: list[Text], page_size: int, seed: int = 0) -> None:
        needed = [-(-len(text) // page_size) for text in texts]
        order = list(range(sum(needed) + 3))
        random.Random(seed).shuffle(order)
        kv_heads, dim = texts[0].k.shape[1:]
        self.texts, self.page_size = texts, page_size
        self.layer = torch.full((2, len(order), kv_heads, page_size, dim), torch.nan, dtype=texts[0].k.dtype)
        self.tables = torch.full((len(texts), max(needed)), order.pop())
        for table, count in zip(self.tables, needed, strict=True):
            table[:count] = torch.tensor([order.pop() for _ in range(count)])

    def run(self, spans: list[tuple[int, int, int]], padding: int = 0) -> list[torch.Tensor]:
        """Write and attend (text, start, stop) spans as one batch; the result of each."""
        chunks = [self._span(*span) for span in spans]
        slots = torch.cat([self._slots(*span) for span in spans])
        write_kv(self.layer, (torch.cat([c.k for c in chunks]), torch.cat([c.v for c in chunks])), slots)
        q = torch.cat([chunk.q for chunk in chunks] + [chunks[0].q[:1]] * padding)
        metadata = AttentionMetadata(
            query_lens=torch.tensor([stop - start for _, start, stop in spans]),
            context_lens=torch.tensor([stop for _, _, stop in spans]),
            block_tables=self.tables[[index for index, _, _ in spans]],
        )
        result = paged_attention(q, self.layer, metadata, q.shape[-1] ** -0.5)
        assert result.shape == q.shape
        return list(torch.split(result[: len(slots)], [len(chunk) for chunk in chunks]))

    def _span(self, index: int, start: int, stop: int) -> Text:
        text = self.texts[index]
        return Text(text.q[start:stop], text.k[start:stop], text.v[start:stop])

    def _slots(self, index: int, start: int, stop: int) -> torch.Tensor:
        positions = torch.arange(start, stop)
        return self.tables[index][positions // self.page_size] * self.page_size + positions % self.page_size


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@shapes
def test_equals_dense_attention(page_size: int, heads: int, kv_heads: int, dim: int) -> None:
    texts = [random_text(seed, length, heads, kv_heads, dim) for seed, length in enumerate((1, 2, 9, 64, 65, 200))]
    results = Pages(texts, page_size).run([(index, 0, len(text)) for index, text in enumerate(texts)])
    for text, result in zip(texts, results, strict=True):
        torch.testing.assert_close(result.double(), dense(text), atol=2e-6, rtol=1e-5)


def test_long_contexts_equal_dense_attention() -> None:
    text = random_text(0, 5000, 2, 1, 32)
    pages = Pages([text], 64)
    results = [pages.run([(0, start, start + 1000)])[0] for start in range(0, 5000, 1000)]
    torch.testing.assert_close(torch.cat(results).double(), dense(text), atol=2e-6, rtol=1e-5)


def test_bfloat16_is_computed_in_float32() -> None:
    text = random_text(0, 150, 9, 3, 64).to(torch.bfloat16)
    (result,) = Pages([text], 16).run([(0, 0, 150)])
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), dense(text), atol=0, rtol=2**-8)


@pytest.mark.parametrize("seed", range(6))
@shapes
def test_bits_depend_on_nothing_but_the_own_context(seed: int, heads: int, kv_heads: int, dim: int) -> None:
    rng = random.Random(seed)
    texts = [random_text(100 * seed + i, rng.randint(1, 330), heads, kv_heads, dim) for i in range(rng.randint(2, 7))]
    alone = [Pages([text], 64).run([(0, 0, len(text))])[0] for text in texts]
    pages = Pages(texts, rng.choice(PAGE_SIZES), seed)
    done = [0] * len(texts)
    while unfinished := [i for i, text in enumerate(texts) if done[i] < len(text)]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        longest = rng.choice([1, 1, 7, 40, 333])
        spans = [(i, done[i], min(len(texts[i]), done[i] + rng.randint(1, longest))) for i in chosen]
        for (i, start, stop), result in zip(spans, pages.run(spans, padding=rng.randint(0, 3)), strict=True):
            assert torch.equal(result, alone[i][start:stop]), f"text {i}, positions {start} to {stop}"
            done[i] = stop


def test_many_single_queries_equal_their_prefill() -> None:
    texts = [random_text(seed, 40 + 9 * seed, 9, 3, 64) for seed in range(40)]
    pages = Pages(texts, 32)
    expected = pages.run([(index, 0, len(text)) for index, text in enumerate(texts)])
    results = pages.run([(index, len(text) - 1, len(text)) for index, text in enumerate(texts)])
    for result, whole in zip(results, expected, strict=True):
        assert torch.equal(result, whole[-1:])


def test_a_foreign_nan_stays_foreign() -> None:
    text = random_text(1, 100, 4, 2, 16)
    broken = Text(text.q, text.k * torch.nan, text.v * torch.inf)
    (expected,) = Pages([text], 16).run([(0, 0, 100)])
    result, other = Pages([text, broken], 16).run([(0, 0, 100), (1, 0, 100)])
    assert torch.equal(result, expected)
    assert other.isnan().all()


def test_scores_far_below_the_largest_weigh_nothing() -> None:
    text = random_text(2, 130, 4, 2, 16)
    peaked = Text(text.q * 40, text.k, text.v)
    (result,) = Pages([peaked], 16).run([(0, 0, 130)])
    torch.testing.assert_close(result.double(), dense(peaked), atol=1e-4, rtol=1e-4)
