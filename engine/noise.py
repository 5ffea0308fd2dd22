"""Stateless Gumbel noise: a pure function of (seed, sample index, position, token id).

With mix(x) the 64-bit finaliser of SplitMix64 (Steele, Lea and Flood 2014, constants of Stafford's variant 13), gamma
its Weyl increment, and all integers modulo 2^64:

    key = mix(mix(mix(seed + gamma) + sample * gamma) + position * gamma)
    h   = mix(key + (token + 1) * gamma)
    v   = float32(h mod 2^63) / 2^63, clamped to [2^-63, 1 - 2^-24]
    g   = -log(-log1p(-v))

v keeps 24 significant bits however small it is, so the upper tail of g, which decides who wins an argmax over a large
vocabulary, is right down to probabilities of 2^-63. The integers are the same on every device; g differs by the last
bits of a device's logarithms.
"""

from __future__ import annotations

import torch

_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


def noise_keys(seeds: torch.Tensor, samples: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One key [rows] for each (seed, sample index, position); all int64 [rows]."""
    return _mix_(_mix_(_mix_(seeds + _GAMMA) + samples * _GAMMA) + positions * _GAMMA)


def gumbel(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise [rows, tokens], float32, for `keys` [rows] and `token_ids` [tokens], both int64."""
    bits = _mix_(keys[:, None] + (token_ids + 1) * _GAMMA).bitwise_and_(2**63 - 1)
    uniform = bits.to(torch.float32).mul_(2.0**-63).clamp_(2.0**-63, 1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix_(x: torch.Tensor) -> torch.Tensor:
    # In place with one scratch tensor: fresh memory for each step would triple the time.
    scratch = torch.empty_like(x)
    _xor_shift_(x, 30, scratch).mul_(_MULTIPLIER_1)
    _xor_shift_(x, 27, scratch).mul_(_MULTIPLIER_2)
    return _xor_shift_(x, 31, scratch)


def _xor_shift_(x: torch.Tensor, count: int, scratch: torch.Tensor) -> torch.Tensor:
    # torch shifts int64 arithmetically: clear the copies of the sign bit.
    torch.bitwise_right_shift(x, count, out=scratch).bitwise_and_((1 << (64 - count)) - 1)
    return x.bitwise_xor_(scratch)
