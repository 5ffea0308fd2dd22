"""Thresholds of top-k and top-p, exact, found among the tokens of a few bins; and the draw itself if those are all.

Candidates are bisected on the bits of their float32 distance |score| until the very token is found that reaches k, or
the mass. Masses are sums of int64 multiples of 2^-42, exact whatever their order. A nucleus so flat that many
candidates are left takes a tile of them at a time: slower, and still exact.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from splitserve.kernels.gumbel import gumbel, noise_key
from splitserve.kernels.sampling_bins import bin_of, rough_distance
from splitserve.kernels.sampling_scratch import (
    ADJUSTED,
    BY_COUNT,
    CANDIDATES,
    CANDIDATES_BEFORE,
    CHUNK_TOKENS,
    CHUNK_VALUES,
    COUNT_ABOVE,
    DONE,
    FIRST_BIN,
    FURTHEST,
    LAST_BIN,
    LEAST_TEMPERATURE,
    MODE,
    NO_TOKEN,
    ROW_BEST,
    ROW_LEAST_WEIGHT,
    ROW_NUMBERS,
    ROW_RANGE,
    ROW_VALUES,
    SELECT,
    WHOLE,
    arrives_last,
    emit,
    load_logits,
)

MASS_UNIT = tl.constexpr(2.0**42)
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def keeps(scores, furthest, least_weight, least_score):  # type: ignore[no-untyped-def]
    """Whether top-k (by the bits of the distance), top-p (by weight) and min-p (by score) keep a token."""
    distance = tl.abs(scores).to(tl.int32, bitcast=True)
    return (distance <= furthest) & (tl.exp(scores) >= least_weight) & (scores >= least_score)


@triton.jit
def least_kept_score(min_p):  # type: ignore[no-untyped-def]
    log = tl.log(tl.where(min_p > 0.0, min_p, 1.0).to(tl.float64)).to(tl.float32)
    return tl.where(min_p > 0.0, log, float("-inf"))


@triton.jit
def _mass(scores):  # type: ignore[no-untyped-def]
    return (tl.exp(scores) * MASS_UNIT).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def select_kernel(  # type: ignore[no-untyped-def]
    logits, row_stride, slots, positions,
    temperature, top_p, min_p, repetition, presence, frequency, seed, sample, logprobs, counts, tokens, logprob,
    adjusted, candidates, candidate_ids, chunk_values, chunk_tokens, mass_above, row_values, row_numbers, arrivals,
    vocab, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (chunk, row) collects a chunk's candidates; the last of a row finds the thresholds among them."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    numbers, values = row_numbers + row * ROW_NUMBERS, row_values + row * ROW_VALUES
    if tl.load(numbers + MODE) != SELECT:
        return
    slot = tl.load(slots + row).to(tl.int64)
    p, heat, logits_row = tl.load(top_p + slot), tl.load(temperature + slot), logits + row * row_stride
    found, ids = candidates + row * (CHUNKS * CHUNK), candidate_ids + row * CHUNK
    number, above = tl.load(numbers + CANDIDATES), mass_above + row * CHUNKS
    alone = (tl.load(numbers + COUNT_ABOVE) == 0) & (number <= CHUNK)
    _collect(
        logits_row, adjusted + row * (CHUNKS * CHUNK), tl.load(numbers + ADJUSTED) != 0, chunk * CHUNK, vocab, heat, p,
        found, ids, alone, tl.load(chunk_tokens + (row * CHUNK_TOKENS + CANDIDATES_BEFORE) * CHUNKS + chunk),
        above + chunk, values, numbers, CHUNK, BLOCK,
    )  # fmt: skip
    if arrives_last(arrivals + row, CHUNKS):
        whole = chunk_values + (row * CHUNK_VALUES + WHOLE) * CHUNKS
        furthest, least_weight = _find_thresholds(p, found, number, whole, above, numbers, CHUNKS, LANES, CHUNK // 4)
        if alone:
            key = noise_key(tl.load(seed + slot), tl.load(sample + slot), tl.load(positions + row))
            token = _draw_candidate(
                found, ids, number, furthest, least_weight, least_kept_score(tl.load(min_p + slot)), key, BLOCK
            )
            emit(
                token, row, slot, logits_row, row_values, tokens, logprob, counts, logprobs, repetition, presence,
                frequency, vocab,
            )  # fmt: skip
            tl.store(numbers + MODE, DONE)
        else:
            tl.store(numbers + FURTHEST, furthest)
            tl.store(values + ROW_LEAST_WEIGHT, least_weight)


@triton.jit  # type: ignore[untyped-decorator]
def _collect(  # type: ignore[no-untyped-def]
    logits_row, adjusted_row, is_adjusted, start, vocab, temperature, p, found, ids, with_ids, before, mass_above,
    values, numbers, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a chunk's candidates to their places from `before` on, and the mass of what lies above them."""
    best, spread = tl.load(values + ROW_BEST), tl.load(values + ROW_RANGE)
    first_bin, last_bin = tl.load(numbers + FIRST_BIN), tl.load(numbers + LAST_BIN)
    above = tl.zeros([BLOCK], tl.int64)
    for first in range(start, start + CHUNK, BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = load_logits(logits_row, adjusted_row, is_adjusted, token, token < vocab)
        bins = bin_of(rough_distance(x, best, temperature), spread)
        if tl.min(bins) <= last_bin:
            scores = tl.div_rn(x - best, tl.maximum(temperature, LEAST_TEMPERATURE))
            inside = ((token < vocab) & (bins >= first_bin) & (bins <= last_bin)).to(tl.int32)
            place = before + tl.cumsum(inside, 0) - 1
            tl.store(found + place, tl.abs(scores).to(tl.int32, bitcast=True), mask=inside != 0)
            if with_ids:
                tl.store(ids + place, token, mask=inside != 0)
            before += tl.sum(inside)
            above += tl.where(bins < first_bin, _mass(scores), 0)
    tl.store(mass_above, tl.sum(above))


@triton.jit  # type: ignore[untyped-decorator]
def _find_thresholds(  # type: ignore[no-untyped-def]
    p, found, candidates, whole, above, numbers, CHUNKS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr
):
    """The largest distance, as bits, that top-k keeps and the least weight that top-p does."""
    k, lane = tl.load(numbers + BY_COUNT), tl.arange(0, LANES)
    nearest, furthest = tl.full((), INFINITY_BITS, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, candidates, TILE):
        place = start + tl.arange(0, TILE)
        nearest = tl.minimum(nearest, tl.min(tl.load(found + place, mask=place < candidates, other=INFINITY_BITS)))
        furthest = tl.maximum(furthest, tl.max(tl.load(found + place, mask=place < candidates, other=0)))
    kept, least_weight = tl.full((), 0x7FFFFFFF, tl.int32), tl.full((), 0.0, tl.float32)
    if k > 0:
        count_above = tl.load(numbers + COUNT_ABOVE).to(tl.int64)
        furthest = _bisect(found, candidates, nearest, furthest, count_above, k.to(tl.int64), False, TILE)
        kept = furthest
    if p < 1.0:
        mass_above = tl.sum(tl.load(above + lane, mask=lane < CHUNKS, other=0))
        mass = tl.sum(tl.load(whole + lane, mask=lane < CHUNKS, other=0.0).to(tl.float64)) * MASS_UNIT
        if k > 0:
            mass = (mass_above + _total(found, candidates, furthest, True, TILE)).to(tl.float64)
        goal = (mass * p.to(tl.float64)).to(tl.int64)
        reached = _bisect(found, candidates, nearest, furthest, mass_above, goal, True, TILE)
        least_weight = tl.exp(-reached.to(tl.float32, bitcast=True))
    return kept, least_weight


@triton.jit  # type: ignore[untyped-decorator]
def _draw_candidate(  # type: ignore[no-untyped-def]
    found, ids, candidates, furthest, least_weight, least_score, key, BLOCK: tl.constexpr
):
    """The lowest token with the largest sum of score and noise among the candidates that the filters keep."""
    largest, drawn = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], NO_TOKEN, tl.int32)
    for start in range(0, candidates, BLOCK):
        place = start + tl.arange(0, BLOCK)
        distance = tl.load(found + place, mask=place < candidates, other=INFINITY_BITS)
        token = tl.load(ids + place, mask=place < candidates, other=0)
        scores = -distance.to(tl.float32, bitcast=True)
        kept = (place < candidates) & keeps(scores, furthest, least_weight, least_score)
        value = tl.where(kept, scores + gumbel(key, token), float("-inf"))
        drawn = tl.where(value > largest, token, drawn)
        largest = tl.maximum(value, largest)
    return tl.min(tl.where(largest == tl.max(largest), drawn, NO_TOKEN))


@triton.jit  # type: ignore[untyped-decorator]
def _bisect(  # type: ignore[no-untyped-def]
    found, candidates, low, high, above, goal, weigh: tl.constexpr, TILE: tl.constexpr
):
    """The least distance, as bits from `low` to `high`, down to which candidates and those above reach the goal."""
    while low < high:
        middle = low + (high - low) // 2
        if above + _total(found, candidates, middle, weigh, TILE) >= goal:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit  # type: ignore[untyped-decorator]
def _total(found, candidates, furthest, weigh: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Number, or mass, of the candidates down to a distance."""
    total = tl.full((), 0, tl.int64)
    for start in range(0, candidates, TILE):
        place = start + tl.arange(0, TILE)
        distance = tl.load(found + place, mask=place < candidates, other=INFINITY_BITS)
        counted = (distance <= furthest) & (place < candidates)
        if weigh:
            total += tl.sum(tl.where(counted, _mass(-distance.to(tl.float32, bitcast=True)), 0))
        else:
            total += tl.sum(counted.to(tl.int32)).to(tl.int64)
    return total
