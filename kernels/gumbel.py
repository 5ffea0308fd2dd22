"""The keyed Gumbel noise of `engine.noise` inside Triton kernels: the same integers, logarithms of the device.

key = mix(mix(mix(seed + gamma) + sample * gamma) + position * gamma)
h   = mix(key + (token + 1) * gamma)
v   = float32(h mod 2^63) / 2^63, clamped to [2^-63, 1 - 2^-24]
g   = -log(-log1p(-v))
"""

from __future__ import annotations

import triton
import triton.language as tl

from splitserve.kernels.launch import INTERPRETING

INTERPRETED = tl.constexpr(INTERPRETING)
LN_2 = tl.constexpr(0.6931471805599453)
GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB)
LEAST_UNIFORM = tl.constexpr(2.0**-63)
LARGEST_UNIFORM = tl.constexpr(1 - 2.0**-24)


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 30)) * MULTIPLIER_1
    x = (x ^ (x >> 27)) * MULTIPLIER_2
    return x ^ (x >> 31)


@triton.jit
def noise_key(seed, sample, position):  # type: ignore[no-untyped-def]
    """The uint64 key of int64 (seed, sample index, position)."""
    key = _mix(seed.to(tl.uint64) + GAMMA)
    key = _mix(key + sample.to(tl.uint64) * GAMMA)
    return _mix(key + position.to(tl.uint64) * GAMMA)


@triton.jit
def noise_bits(key, tokens):  # type: ignore[no-untyped-def]
    """63 random bits, int64, for each of `tokens` (integers)."""
    return (_mix(key + (tokens + 1).to(tl.uint64) * GAMMA) & 0x7FFFFFFFFFFFFFFF).to(tl.int64)


@triton.jit
def _uniform(key, tokens):  # type: ignore[no-untyped-def]
    uniform = noise_bits(key, tokens).to(tl.float32) * LEAST_UNIFORM
    return tl.minimum(tl.maximum(uniform, LEAST_UNIFORM), LARGEST_UNIFORM)


@triton.jit
def gumbel(key, tokens):  # type: ignore[no-untyped-def]
    """Standard Gumbel noise, float32."""
    uniform = _uniform(key, tokens)
    # log1p(-v) by Kahan: the rounding of 1 - v cancels in the ratio. Triton's interpreter has no log1p.
    rest = 1.0 - uniform
    rounded = 1.0 - rest
    exponential = tl.where(rounded == 0.0, uniform, -tl.log(rest) * (uniform / tl.where(rounded == 0.0, 1.0, rounded)))
    return -tl.log(exponential)


@triton.jit
def rough_gumbel(key, tokens):  # type: ignore[no-untyped-def]
    """The same within 1e-4, for half the instructions: it tells which tokens are worth the exact noise."""
    uniform = _uniform(key, tokens)
    series = uniform * (1.0 + uniform * (0.5 + uniform * 0.33333334))
    exponential = tl.where(uniform < 0.03125, series, -LN_2 * _rough_log2(1.0 - uniform))
    return -LN_2 * _rough_log2(exponential)


@triton.jit
def _rough_log2(x):  # type: ignore[no-untyped-def]
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
