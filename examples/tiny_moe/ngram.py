"""An n-gram language model, the baseline beside a neural one: interpolated modified Kneser-Ney smoothing.

The formulas are those of S. F. Chen and J. Goodman, "An Empirical Study of Smoothing Techniques for Language
Modeling", Harvard University TR-10-98 (1998). The counts at the beginning of a document are those of K. Heafield et
al., "Scalable Modified Kneser-Ney Language Model Estimation", ACL 2013.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SEPARATOR = 0


@dataclass(frozen=True, slots=True)
class Level:
    """The probabilities of one n-gram length: what each seen n-gram keeps, what each seen context passes down.

    A key packs the tokens of an n-gram or a context (an n-gram without its last token), the oldest in the highest bits.
    """

    ngrams: NDArray[np.int64]  # [n-grams], ascending
    kept: NDArray[np.float64]  # [n-grams]: (count - discount) / total of the context
    contexts: NDArray[np.int64]  # [contexts], ascending
    passed_down: NDArray[np.float64]  # [contexts]: discounts taken from the context / total of the context


@dataclass(frozen=True, slots=True)
class KneserNey:
    """An interpolated modified Kneser-Ney model over token ids.

    The probability of a token after a context is what its n-gram keeps, plus what the context passes down times the
    probability after the context without its oldest token. A context never seen passes everything down. Below single
    tokens lies the uniform distribution, so every token has a probability above 0.

    The count of a longest n-gram is how often it occurs; the count of a shorter one is after how many different tokens
    it occurs. One that begins its document comes after nothing, and each of its occurrences counts.
    """

    vocab: int
    levels: tuple[Level, ...]  # levels[0]: single tokens; levels[-1]: the longest n-grams

    @classmethod
    def fit(cls, tokens: NDArray[np.integer], order: int, vocab: int) -> KneserNey:
        """Count `tokens`, integers [n] from 0 to `vocab` - 1: documents end to end, each beginning with token 0.

        The 0 that begins a document also ends the one before it: it is predicted, and no context reaches back past it.
        Each n-gram length has its own three discounts, estimated from how many n-grams have the counts 1 to 4. One
        that cannot be estimated, as on tiny data, is half the count it is taken from: 0.5, 1 or 1.5.
        """
        if order < 2:
            raise ValueError(f"order: found {order}; the least is 2")
        limit = 1 << 63 // order
        if not 2 <= vocab <= limit:
            raise ValueError(f"vocab: found {vocab}; order {order} takes 2 to {limit}, so that a key has 63 bits")
        if tokens.size < 2:
            raise ValueError(f"tokens: found {tokens.size}; there must be at least 2")
        _check_tokens(tokens, vocab)
        bits = _bits(vocab)
        longest = np.minimum(_reach(tokens), order)
        levels: list[Level] = []
        seen = np.empty(0, np.int64)
        for length in range(order, 0, -1):
            suffixes = seen & ((1 << bits * length) - 1)  # of the different n-grams one token longer
            # Nothing longer ends where these do, as they have full length or begin their document.
            whole = _pack(tokens, 1 + np.flatnonzero(longest == length), length, bits)
            seen, counts = np.unique(np.concatenate((suffixes, whole)), return_counts=True)
            levels.append(_level(seen, counts, bits))
        return cls(vocab, tuple(reversed(levels)))

    def log_probabilities(self, tokens: NDArray[np.integer]) -> NDArray[np.float64]:
        """The natural logarithm of each token's probability after the tokens before it in its document.

        `tokens` are integers [n] as for `fit`. The result is float64 [n - 1], from the second token on.
        """
        if not tokens.size:
            raise ValueError("tokens: found none; there must be at least 1")
        _check_tokens(tokens, self.vocab)
        bits = _bits(self.vocab)
        reach = _reach(tokens)
        probabilities = np.full(tokens.size - 1, 1 / self.vocab)
        for length, level in enumerate(self.levels, 1):
            places = np.flatnonzero(reach >= length)
            ngrams = _pack(tokens, 1 + places, length, bits)
            passed_down = _look_up(level.contexts, level.passed_down, ngrams >> bits, 1.0)
            kept = _look_up(level.ngrams, level.kept, ngrams, 0.0)
            probabilities[places] = kept + passed_down * probabilities[places]
        logarithms: NDArray[np.float64] = np.log(probabilities)
        return logarithms


def _check_tokens(tokens: NDArray[np.integer], vocab: int) -> None:
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise ValueError(f"tokens: found {tokens.min()} to {tokens.max()}; vocab allows 0 to {vocab - 1}")


def _bits(vocab: int) -> int:
    return (vocab - 1).bit_length()


def _reach(tokens: NDArray[np.integer]) -> NDArray[np.int64]:
    """For each token from the second on, int64 [n - 1]: the tokens from its document's beginning up to and with it."""
    places = np.arange(tokens.size)
    beginnings: NDArray[np.int64] = np.maximum.accumulate(np.where(tokens == SEPARATOR, places, 0))
    return places[1:] - beginnings[:-1] + 1  # a separator is the last token of the document before it


def _pack(tokens: NDArray[np.integer], ends: NDArray[np.int64], length: int, bits: int) -> NDArray[np.int64]:
    """The keys, one for each of `ends`, of the n-grams of `length` tokens whose last token is there."""
    keys = np.zeros(ends.size, np.int64)
    for back in range(length - 1, -1, -1):
        keys = keys << bits | tokens[ends - back].astype(np.int64)
    return keys


def _level(ngrams: NDArray[np.int64], counts: NDArray[np.int64], bits: int) -> Level:
    """Take D1, D2 or D3 off the n-grams of one length: those of count 1, of count 2 and of higher counts."""
    if not ngrams.size:
        return Level(ngrams, np.empty(0), ngrams, np.empty(0))
    contexts, first, sizes = np.unique(ngrams >> bits, return_index=True, return_counts=True)
    discounts = np.array(_discounts(counts))[np.minimum(counts, 3)]
    totals = np.add.reduceat(counts, first)
    kept = (counts - discounts) / np.repeat(totals, sizes)
    return Level(ngrams, kept, contexts, np.add.reduceat(discounts, first) / totals)


def _discounts(counts: NDArray[np.int64]) -> list[float]:
    """0, D1, D2 and D3: with n[k] n-grams of count k and y = n1 / (n1 + 2 n2), Dk = k - (k + 1) y n[k + 1] / n[k].

    Where n1 or n[k] is 0, or the estimate is not above 0, Dk = k / 2.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).tolist()
    discounts = [0.0]
    for k in (1, 2, 3):
        estimate = k - (k + 1) * n[1] / (n[1] + 2 * n[2]) * n[k + 1] / n[k] if n[1] and n[k] else 0.0
        discounts.append(estimate if estimate > 0 else k / 2)
    return discounts


def _look_up(
    keys: NDArray[np.int64], values: NDArray[np.float64], wanted: NDArray[np.int64], absent: float
) -> NDArray[np.float64]:
    """The value of each wanted key, float64 of the shape of `wanted`: `absent` where `keys` lacks it."""
    places = np.searchsorted(keys, wanted)
    found = places < keys.size
    found[found] = keys[places[found]] == wanted[found]
    result = np.full(wanted.shape, absent)
    result[found] = values[places[found]]
    return result
