"""Checksum of a packed payload: cheap enough for every byte, and tied to the header that it travels under."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

BLOCK_WORDS = 1 << 14
_MASK = (1 << 64) - 1


def checksum(payload: torch.Tensor, identity: bytes) -> int:
    """Signed 64-bit checksum of `payload` (uint8 in host memory, a multiple of 4 bytes) under `identity`.

    Multilinear hashing (Carter and Wegman 1979): the sum modulo 2^64 of weight(i) * word(i), over signed 4-byte words
    and with odd 64-bit weights from a fixed integer mix. Any change of a single word is caught for certain; swapped,
    shifted, zeroed or repeated words but for one chance in about 2^32. Eight-byte words would run faster, but two of
    them with their top bits flipped would cancel out. A hash of `identity` is added, so that a payload does not pass
    under another header. A GPU kernel can form the sum in any order, in the pass that packs.
    """
    return bind(weighted_sum(payload), identity, payload.numel())


def bind(total: int, identity: bytes, size: int) -> int:
    """The checksum of `size` bytes under `identity`, from their weighted sum."""
    bound = hashlib.blake2b(identity + size.to_bytes(8, "little"), digest_size=8).digest()
    return signed(total + int.from_bytes(bound, "little"))


def weighted_sum(payload: torch.Tensor) -> int:
    """The sum alone, signed 64-bit: what `kernels.kv_pack` adds up for a payload on a GPU."""
    words = payload.numpy().view(np.int32)
    whole = words.size // BLOCK_WORDS
    blocks = words[: whole * BLOCK_WORDS].reshape(whole, BLOCK_WORDS)
    weights = _weights(BLOCK_WORDS)
    sums = np.einsum("bi,i->b", blocks, weights)
    tail = np.einsum("i,i->", words[whole * BLOCK_WORDS :], weights[: words.size % BLOCK_WORDS])
    return signed(int(sums @ _block_weights(whole)) + int(tail))


@lru_cache
def _weights(count: int) -> npt.NDArray[np.int64]:
    return _mix(np.arange(1, count + 1, dtype=np.uint64))


@lru_cache
def _block_weights(count: int) -> npt.NDArray[np.int64]:
    """A factor for each whole block, odd and unlike the tail's, which is 1."""
    return _mix(np.arange(1, count + 1, dtype=np.uint64) << np.uint64(32))


def _mix(counter: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Odd 64-bit numbers by splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    z = counter * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)


def signed(value: int) -> int:
    """`value` modulo 2^64, as a signed number."""
    return ((value + (1 << 63)) & _MASK) - (1 << 63)
