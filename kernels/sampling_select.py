"""Thresholds of top-k and top-p, exact, found among the tokens of a few bins; and the draw itself if those are all.

Candidates are collected in any order. Few are sorted by their float32 distance |score|; more are bisected on its bits,
until the very token is found that reaches k, or the mass. Masses are sums of int64 multiples of 2^-42, exact whatever
their order. A nucleus so flat that many candidates are left is slow, and still exact.
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
    CHUNK_VALUES,
    COUNT_ABOVE,
    DRAW,
    FIRST_BIN,
    FURTHEST,
    LAST_BIN,
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
    load_scores,
    push,
    queue_length,
    queued_row,
    scores_of,
)

MASS_UNIT = tl.constexpr(2.0**42)
INFINITY_BITS = tl.constexpr(0x7F800000)
NO_CANDIDATE = tl.constexpr(0x7FFFFFFF7FFFFFFF)


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
    adjusted, candidates, chunk_values, mass_above, row_values, row_numbers, queues, arrivals, vocab, rows,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs collect the candidates of chunks; the last of a row finds the thresholds among them."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for item in range(tl.program_id(0), queue_length(queues, rows, SELECT) * CHUNKS, tl.num_programs(0)):
        row, chunk = queued_row(queues, rows, item // CHUNKS, SELECT), item % CHUNKS
        numbers, values = row_numbers + row * ROW_NUMBERS, row_values + row * ROW_VALUES
        slot = tl.load(slots + row).to(tl.int64)
        p, heat, is_adjusted = tl.load(top_p + slot), tl.load(temperature + slot), tl.load(numbers + ADJUSTED) != 0
        logits_row, adjusted_row = logits + row * row_stride, adjusted + row * (CHUNKS * CHUNK)
        found, above = candidates + row * (CHUNKS * CHUNK), mass_above + row * CHUNKS
        _collect(
            logits_row, adjusted_row, is_adjusted, chunk * CHUNK, vocab, heat, found, above + chunk, values, numbers,
            CHUNK, BLOCK,
        )  # fmt: skip
        if arrives_last(arrivals + row, CHUNKS):
            number, k, count_above = (
                tl.load(numbers + CANDIDATES),
                tl.load(numbers + BY_COUNT),
                tl.load(numbers + COUNT_ABOVE),
            )
            lane, whole = tl.arange(0, LANES), chunk_values + (row * CHUNK_VALUES + WHOLE) * CHUNKS
            mass, over = tl.full((), 0.0, tl.float64), tl.full((), 0, tl.int64)
            if p < 1.0:
                mass = tl.sum(tl.load(whole + lane, mask=lane < CHUNKS, other=0.0).to(tl.float64)) * MASS_UNIT
                over = tl.sum(tl.load(above + lane, mask=lane < CHUNKS, other=0))
            best = tl.load(values + ROW_BEST)
            drawn = tl.full((), NO_TOKEN, tl.int32)
            if number <= CHUNK // 4:
                key = noise_key(tl.load(seed + slot), tl.load(sample + slot), tl.load(positions + row))
                furthest, least_weight, drawn = _sort_and_draw(
                    logits_row, adjusted_row, is_adjusted, best, heat, found, number, k, count_above, p, mass, over,
                    least_kept_score(tl.load(min_p + slot)), key, CHUNK // 4,
                )  # fmt: skip
            else:
                _measure(logits_row, adjusted_row, is_adjusted, best, heat, found, number, BLOCK)
                furthest, least_weight = _find_thresholds(found, number, k, count_above, p, mass, over, BLOCK)
            if (count_above == 0) & (drawn != NO_TOKEN):
                emit(
                    drawn, row, slot, logits_row, row_values, tokens, logprob, counts, logprobs, repetition, presence,
                    frequency, vocab,
                )  # fmt: skip
            else:
                tl.store(numbers + FURTHEST, furthest)
                tl.store(values + ROW_LEAST_WEIGHT, least_weight)
                push(queues, rows, row, DRAW)


@triton.jit  # type: ignore[untyped-decorator]
def _collect(  # type: ignore[no-untyped-def]
    logits_row, adjusted_row, is_adjusted, start, vocab, temperature, found, mass_above, values, numbers,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Append a chunk's candidates to the row's, and sum the mass of what lies above them."""
    best, spread = tl.load(values + ROW_BEST), tl.load(values + ROW_RANGE)
    first_bin, last_bin = tl.load(numbers + FIRST_BIN), tl.load(numbers + LAST_BIN)
    above = tl.zeros([BLOCK], tl.int64)
    for first in range(start, start + CHUNK, BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = load_logits(logits_row, adjusted_row, is_adjusted, token, token < vocab)
        bins = bin_of(rough_distance(x, best, temperature), spread)
        inside = ((token < vocab) & (bins >= first_bin) & (bins <= last_bin)).to(tl.int32)
        number = tl.sum(inside)
        if number > 0:
            place = tl.atomic_add(numbers + CANDIDATES, number, sem="relaxed") + tl.cumsum(inside, 0) - 1
            tl.store(found + place, token, mask=inside != 0)
        if first_bin > 0:
            above += tl.where(bins < first_bin, _mass(scores_of(x, best, temperature)), 0)
    tl.store(mass_above, tl.sum(above))


@triton.jit  # type: ignore[untyped-decorator]
def _sort_and_draw(  # type: ignore[no-untyped-def]
    logits_row, adjusted_row, is_adjusted, best, temperature, found, candidates, k, count_above, p, mass, mass_above,
    least_score, key, FEW: tl.constexpr,
):  # fmt: skip
    """The thresholds, and the token to draw if the candidates are all that may be kept.

    Thresholds are the largest distance, as bits, that top-k keeps and the least weight that top-p does.
    """
    place = tl.arange(0, FEW)
    token = tl.load(found + place, mask=place < candidates, other=0)
    scores = load_scores(logits_row, adjusted_row, is_adjusted, token, place < candidates, best, temperature)
    packed = (tl.abs(scores).to(tl.int32, bitcast=True).to(tl.int64) << 32) | token.to(tl.int64)
    packed = tl.sort(tl.where(place < candidates, packed, NO_CANDIDATE))
    distance, token = (packed >> 32).to(tl.int32), (packed & 0x7FFFFFFF).to(tl.int32)
    furthest, least_weight = tl.full((), 0x7FFFFFFF, tl.int32), tl.full((), 0.0, tl.float32)
    if k > 0:
        furthest = tl.sum(tl.where(place == k - 1 - count_above, distance, 0))
    scores = -tl.where(place < candidates, distance, INFINITY_BITS).to(tl.float32, bitcast=True)
    kept = (place < candidates) & (distance <= furthest)
    if p < 1.0:
        own = tl.where(kept, _mass(scores), 0)
        if k > 0:
            mass = (mass_above + tl.sum(own)).to(tl.float64)
        goal = (mass * p.to(tl.float64)).to(tl.int64)
        short = tl.sum((kept & (mass_above + tl.cumsum(own, 0) < goal)).to(tl.int32))
        short = tl.minimum(short, tl.sum(kept.to(tl.int32)) - 1)
        least_weight = tl.exp(tl.sum(tl.where(place == short, scores, 0.0)))
    kept = kept & keeps(scores, furthest, least_weight, least_score)
    sums = tl.where(kept, scores + gumbel(key, token), float("-inf"))
    return furthest, least_weight, tl.min(tl.where(kept & (sums == tl.max(sums)), token, NO_TOKEN))


@triton.jit  # type: ignore[untyped-decorator]
def _measure(  # type: ignore[no-untyped-def]
    logits_row, adjusted_row, is_adjusted, best, temperature, found, candidates, TILE: tl.constexpr
):
    """Put the bits of candidates' distances in the place of their ids."""
    for start in range(0, candidates, TILE):
        place = start + tl.arange(0, TILE)
        token = tl.load(found + place, mask=place < candidates, other=0)
        scores = load_scores(logits_row, adjusted_row, is_adjusted, token, place < candidates, best, temperature)
        tl.store(found + place, tl.abs(scores).to(tl.int32, bitcast=True), mask=place < candidates)
    tl.debug_barrier()


@triton.jit  # type: ignore[untyped-decorator]
def _find_thresholds(  # type: ignore[no-untyped-def]
    found, candidates, k, count_above, p, mass, mass_above, TILE: tl.constexpr
):
    """The thresholds of `_sort_and_draw`, by bisection."""
    nearest, last = tl.full((), INFINITY_BITS, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, candidates, TILE):
        place = start + tl.arange(0, TILE)
        nearest = tl.minimum(nearest, tl.min(tl.load(found + place, mask=place < candidates, other=INFINITY_BITS)))
        last = tl.maximum(last, tl.max(tl.load(found + place, mask=place < candidates, other=0)))
    furthest, least_weight = tl.full((), 0x7FFFFFFF, tl.int32), tl.full((), 0.0, tl.float32)
    if k > 0:
        last = _bisect(found, candidates, nearest, last, count_above.to(tl.int64), k.to(tl.int64), False, TILE)
        furthest = last
    if p < 1.0:
        if k > 0:
            mass = (mass_above + _total(found, candidates, last, True, TILE)).to(tl.float64)
        goal = (mass * p.to(tl.float64)).to(tl.int64)
        reached = _bisect(found, candidates, nearest, last, mass_above, goal, True, TILE)
        least_weight = tl.exp(-reached.to(tl.float32, bitcast=True))
    return furthest, least_weight


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
