from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.kv_transfer import checksum as module
from splitserve.kv_transfer.checksum import BLOCK_WORDS, checksum

IDENTITY = b"transfer 7"
Words = npt.NDArray[np.signedinteger[Any]]
SIZES = [4, 8, 64, 4096, 4 * BLOCK_WORDS - 4, 4 * BLOCK_WORDS, 4 * BLOCK_WORDS + 4, 12 * BLOCK_WORDS + 20]


def payload(size: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES)
def test_the_sum_is_the_documented_one(size: int) -> None:
    data = payload(size)
    words = data.numpy().view(np.int32).tolist()
    weights = module._weights(BLOCK_WORDS).tolist()
    whole = len(words) // BLOCK_WORDS
    factors = [*module._block_weights(whole).tolist(), 1]
    total = sum(word * weights[index % BLOCK_WORDS] * factors[index // BLOCK_WORDS] for index, word in enumerate(words))
    assert (module.weighted_sum(data) - total) % 2**64 == 0
    assert (checksum(data, IDENTITY) - module.bind(total, IDENTITY, size)) % 2**64 == 0


@settings(max_examples=200, deadline=None)
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 2**32), changes=st.integers(1, 16))
def test_changed_bytes_are_caught(size: int, seed: int, changes: int) -> None:
    data, rng = payload(size, seed % 5), random.Random(seed)
    damaged = data.clone()
    for position in rng.sample(range(size), min(changes, size)):
        damaged[position] ^= rng.randint(1, 255)
    assert checksum(damaged, IDENTITY) != checksum(data, IDENTITY)


def _swap(words: Words, i: int, j: int) -> None:
    words[[i, j]] = words[[j, i]]


def _repeat(words: Words, i: int, j: int) -> None:
    words[i] = words[j]


def _zero(words: Words, i: int, j: int) -> None:
    words[min(i, j) : max(i, j) + 1] = 0


def _shift(words: Words, i: int, j: int) -> None:
    words[:] = np.roll(words, 1 + abs(i - j) % (len(words) - 1))


def _flip_top_bits(words: Words, i: int, j: int) -> None:
    words[[i, j]] ^= np.iinfo(words.dtype).min


@pytest.mark.parametrize("damage", [_swap, _repeat, _zero, _shift, _flip_top_bits])
@pytest.mark.parametrize("width", [np.int32, np.int64])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.sampled_from(SIZES[3:]))
def test_moved_and_lost_words_are_caught(
    damage: Callable[[Words, int, int], None], width: type, seed: int, size: int
) -> None:
    data, rng = payload(size - size % 8, seed % 5), random.Random(seed)
    damaged = data.clone()
    words: Words = damaged.numpy().view(width)
    damage(words, *rng.sample(range(len(words)), 2))
    assert not torch.equal(data, damaged)
    assert checksum(damaged, IDENTITY) != checksum(data, IDENTITY)


def test_it_is_tied_to_identity_and_length() -> None:
    data = payload(64)
    zeros = torch.zeros(64, dtype=torch.uint8)
    sums = {
        checksum(data, IDENTITY),
        checksum(data, b"transfer 8"),
        checksum(data[:60], IDENTITY),
        checksum(zeros, IDENTITY),
        checksum(zeros[:60], IDENTITY),
        checksum(zeros[:0], IDENTITY),
    }
    assert len(sums) == 6


def test_it_fits_a_signed_word_and_repeats() -> None:
    for seed in range(50):
        value = checksum(payload(4096, seed), IDENTITY)
        assert -(2**63) <= value < 2**63
        assert value == checksum(payload(4096, seed), IDENTITY)
