from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from numpy.typing import NDArray

from examples.tiny_moe.ngram import KneserNey

Ngram = tuple[int, ...]
Tokens = NDArray[np.uint16]
VOCAB = 12


def skewed(seed: int, size: int) -> Tokens:
    """A random source, the same for every seed, where a few tokens are likely after each two."""
    table = np.random.default_rng(7).dirichlet(np.full(VOCAB, 0.1), size=(VOCAB, VOCAB)).cumsum(axis=2)
    tokens = [0, 0]
    for draw in np.random.default_rng(seed).random(size - 2):
        tokens.append(min(int(np.searchsorted(table[tokens[-2], tokens[-1]], draw)), VOCAB - 1))
    return np.array(tokens, np.uint16)


def uniform(seed: int, size: int, vocab: int) -> Tokens:
    tokens = np.random.default_rng(seed).integers(vocab, size=size).astype(np.uint16)
    tokens[0] = 0
    return tokens


def perplexity(model: KneserNey, tokens: Tokens) -> float:
    return math.exp(-float(model.log_probabilities(tokens).mean()))


class Reference:
    """The formulas again, with a dictionary of n-grams and a recursion for each token."""

    def __init__(self, tokens: Tokens, order: int, vocab: int) -> None:
        self.order, self.vocab = order, vocab
        occurrences: dict[Ngram, int] = defaultdict(int)
        beginnings: dict[Ngram, int] = defaultdict(int)
        before: dict[Ngram, set[int]] = defaultdict(set)
        for document in self.documents(tokens):
            for end in range(2, len(document) + 1):  # the separator in front is only context
                for start in range(max(0, end - order), end):
                    ngram = tuple(document[start:end])
                    occurrences[ngram] += 1
                    if start:
                        before[ngram].add(document[start - 1])
                    else:
                        beginnings[ngram] += 1
        self.counts = {
            ngram: count if len(ngram) == order else len(before[ngram]) + beginnings[ngram]
            for ngram, count in occurrences.items()
        }
        self.discounts = {length: self.estimates(length) for length in range(1, order + 1)}

    @staticmethod
    def documents(tokens: Tokens) -> list[list[int]]:
        """Each document with the separator that begins it and the one that ends it."""
        documents: list[list[int]] = [[int(tokens[0])]]
        for token in tokens[1:].tolist():
            documents[-1].append(token)
            if token == 0:
                documents.append([0])
        return documents

    def estimates(self, length: int) -> tuple[float, float, float, float]:
        counts = [count for ngram, count in self.counts.items() if len(ngram) == length]
        n1, n2, n3, n4 = (counts.count(k) for k in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2) if n1 else math.inf  # then no estimate is above 0
        d1 = y if n1 else 0  # 1 - 2 y n2 / n1 is y
        d2 = 2 - 3 * y * (n3 / n2) if n1 and n2 else 0
        d3 = 3 - 4 * y * (n4 / n3) if n1 and n3 else 0
        return 0.0, d1 if d1 > 0 else 0.5, d2 if d2 > 0 else 1.0, d3 if d3 > 0 else 1.5

    def probability(self, context: Ngram, token: int) -> float:
        lower = self.probability(context[1:], token) if context else 1 / self.vocab
        after = [self.counts.get((*context, follower), 0) for follower in range(self.vocab)]
        if not any(after):
            return lower
        discounts = [self.discounts[len(context) + 1][min(count, 3)] for count in after]
        return (after[token] - discounts[token]) / sum(after) + sum(discounts) / sum(after) * lower

    def log_probabilities(self, tokens: Tokens) -> list[float]:
        return [
            math.log(self.probability(tuple(document[max(0, end - self.order + 1) : end]), document[end]))
            for document in self.documents(tokens)
            for end in range(1, len(document))
        ]


@pytest.mark.parametrize("order", [2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [8, 40, 200, 3000])
def test_equals_the_reference(order: int, seed: int, size: int) -> None:
    train, held_out = skewed(seed, size), skewed(seed + 100, 300)
    expected = Reference(train, order, VOCAB).log_probabilities(held_out)
    np.testing.assert_allclose(KneserNey.fit(train, order, VOCAB).log_probabilities(held_out), expected, rtol=1e-10)


@pytest.mark.parametrize("order", [2, 5])
def test_equals_the_reference_on_short_documents(order: int) -> None:
    tokens = np.array([0, 1, 0, 2, 0, 0, 1, 0], np.uint16)
    expected = Reference(tokens, order, 3).log_probabilities(tokens)
    np.testing.assert_allclose(KneserNey.fit(tokens, order, 3).log_probabilities(tokens), expected, rtol=1e-10)


@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize("size", [40, 5000])
def test_sums_to_one_after_any_context(order: int, size: int) -> None:
    model = KneserNey.fit(skewed(1, size), order, 2 * VOCAB)  # half the vocabulary never occurs
    seen = np.lib.stride_tricks.sliding_window_view(skewed(1, size), 6)[::100]
    contexts = [*seen, *np.random.default_rng(2).integers(2 * VOCAB, size=(20, 6)), np.array([0]), np.array([20])]
    for context in contexts:
        after = [model.log_probabilities(np.append(context, token))[-1] for token in range(2 * VOCAB)]
        assert abs(np.exp(after).sum() - 1) < 1e-9
        assert np.isfinite(after).all()


def test_no_context_reaches_past_a_separator() -> None:
    model = KneserNey.fit(skewed(1, 5000), 5, VOCAB)
    one, other = (model.log_probabilities(np.array([*before, 0, 3, 4, 5]))[-3:] for before in ([0], [0, 7, 8]))
    assert one.tolist() == other.tolist()


def test_more_data_of_a_source_lowers_perplexity() -> None:
    train, held_out = skewed(1, 50_000), skewed(2, 5000)
    found = [perplexity(KneserNey.fit(train[:size], 5, VOCAB), held_out) for size in (500, 5000, 50_000)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0] * 0.8


@pytest.mark.parametrize("order", [2, 5])
def test_a_uniform_source_has_the_perplexity_of_its_vocabulary(order: int) -> None:
    model = KneserNey.fit(uniform(1, 50_000, 40), order, 40)
    assert 40 < perplexity(model, uniform(2, 20_000, 40)) < 40 * 1.1


def test_packs_the_largest_vocabulary() -> None:
    train, held_out = uniform(1, 3000, 6) * 819, uniform(2, 300, 6) * 819  # token ids up to 4095
    small = KneserNey.fit(train // 819, 5, 4096).log_probabilities(held_out // 819)
    assert KneserNey.fit(train, 5, 4096).log_probabilities(held_out).tolist() == small.tolist()


@pytest.mark.parametrize(
    ("tokens", "order", "vocab", "message"),
    [
        ([0, 1], 1, 2, "order: found 1; the least is 2"),
        ([0, 1], 5, 4097, "vocab: found 4097; order 5 takes 2 to 4096"),
        ([0, 0], 2, 1, "vocab: found 1; order 2 takes 2 to 2147483648"),
        ([], 2, 2, "tokens: found 0; there must be at least 2"),
        ([0, 5], 2, 5, "tokens: found 0 to 5; vocab allows 0 to 4"),
        ([0, -1], 2, 5, "tokens: found -1 to 0; vocab allows 0 to 4"),
    ],
)
def test_says_what_fit_takes(tokens: list[int], order: int, vocab: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KneserNey.fit(np.array(tokens, np.int64), order, vocab)


@pytest.mark.parametrize(("tokens", "message"), [([], "tokens: found none"), ([0, 5], "vocab allows 0 to 4")])
def test_says_what_log_probabilities_takes(tokens: list[int], message: str) -> None:
    model = KneserNey.fit(np.array([0, 1, 2], np.uint16), 2, 5)
    with pytest.raises(ValueError, match=message):
        model.log_probabilities(np.array(tokens, np.int64))
