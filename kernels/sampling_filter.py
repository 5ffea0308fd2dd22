"""Thresholds of top-k and top-p without sorting, for the rows that have such filters.

With s = (logit - best) / temperature, distance |s| and weight w = exp(s):

1. `histogram_kernel` counts tokens by distance, in bins between the best and the worst. Counts bound the mass of every
   bin, so a few bins are found outside of which no threshold can lie.
2. `select_kernel` collects the distances in those bins, sums the weights above them, and bisects on the bits of the
   float32 distance until it holds the very token that reaches k, or the mass.

Masses are sums of int64 multiples of 2^-42, exact whatever their order. A nucleus wide enough to leave many candidates
is bisected in tiles of them: slower, and still exact.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from splitserve.kernels.sampling_scan import MAX_RANGE
from splitserve.kernels.sampling_scratch import (
    ADJUSTED,
    BINS,
    BY_COUNT,
    CANDIDATES,
    CANDIDATES_BEFORE,
    CHUNK_TOKENS,
    COUNT_ABOVE,
    DRAW_KEPT,
    FIRST_BIN,
    FURTHEST,
    LAST_BIN,
    MODE,
    ROW_BEST,
    ROW_LEAST_WEIGHT,
    ROW_NUMBERS,
    ROW_RANGE,
    ROW_VALUES,
    SELECT,
    arrives_last,
    load_scores,
)

MASS_UNIT = tl.constexpr(2.0**42)
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _bins(scores, spread):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.abs(scores) * (BINS / spread), BINS - 1.0).to(tl.int32)


@triton.jit
def _mass(scores):  # type: ignore[no-untyped-def]
    return (tl.exp(scores) * MASS_UNIT).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def histogram_kernel(  # type: ignore[no-untyped-def]
    logits, row_stride, slots, temperature, top_k, top_p,
    adjusted, histogram, chunk_tokens, row_values, row_numbers, arrivals, vocab,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (chunk, row) counts a chunk's tokens by distance; the last of a row picks the bins to look at."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    numbers = row_numbers + row * ROW_NUMBERS
    if tl.load(numbers + MODE) != SELECT:
        return
    slot = tl.load(slots + row).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    within = token < vocab
    spread = tl.load(row_values + row * ROW_VALUES + ROW_RANGE)
    scores = load_scores(
        logits + row * row_stride, adjusted + row * (CHUNKS * CHUNK), tl.load(numbers + ADJUSTED) != 0, token, within,
        tl.load(row_values + row * ROW_VALUES + ROW_BEST), tl.load(temperature + slot),
    )  # fmt: skip
    counts = tl.histogram(_bins(scores, spread), BINS, mask=within)
    tl.store(histogram + (row * CHUNKS + chunk) * BINS + tl.arange(0, BINS), counts)
    if arrives_last(arrivals + row, CHUNKS):
        _pick_bins(
            tl.load(top_k + slot), tl.load(top_p + slot), spread, histogram + row * (CHUNKS * BINS),
            chunk_tokens + row * (CHUNK_TOKENS * CHUNKS) + CANDIDATES_BEFORE * CHUNKS, numbers, vocab, CHUNKS, LANES,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _pick_bins(  # type: ignore[no-untyped-def]
    k, p, spread, histogram, candidates_before, numbers, vocab, CHUNKS: tl.constexpr, LANES: tl.constexpr
):
    """The bins that may hold a threshold, and each chunk's place among their tokens."""
    lane, column = tl.arange(0, LANES)[:, None], tl.arange(0, BINS)[None, :]
    by_chunk = tl.load(histogram + lane * BINS + column, mask=lane < CHUNKS, other=0)
    counts, bins = tl.sum(by_chunk, axis=0), tl.arange(0, BINS)
    capped = spread >= MAX_RANGE  # the last bin is then full of tokens that cannot be drawn
    by_count, by_mass = (k > 0) & (k < vocab), p < 1.0
    count_bin = tl.sum((tl.cumsum(counts, 0) < k).to(tl.int32))
    by_count = by_count & ((count_bin < BINS - 1) | (capped == 0))
    first, last = count_bin, count_bin
    if by_mass:
        least = tl.where(by_count & (bins > count_bin), 0, counts)
        before = tl.sum(tl.where(bins < count_bin, counts, 0))
        most = least
        least = tl.where(by_count & (bins == count_bin), tl.minimum(counts, k - before), least)
        first, last = _mass_bins(p, spread, tl.where(bins == BINS - 1, 0, least), most, bins)
        if by_count:
            first, last = tl.minimum(first, count_bin), count_bin
    if capped:
        last = tl.minimum(last, BINS - 2)
    first = tl.minimum(first, last)
    inside = (tl.sum(tl.where((column >= first) & (column <= last), by_chunk, 0), axis=1)).to(tl.int32)
    chunk = tl.arange(0, LANES)
    tl.store(candidates_before + chunk, tl.cumsum(inside, 0) - inside, mask=chunk < CHUNKS)
    tl.store(numbers + FIRST_BIN, first)
    tl.store(numbers + LAST_BIN, last)
    tl.store(numbers + COUNT_ABOVE, tl.sum(tl.where(bins < first, counts, 0)))
    tl.store(numbers + CANDIDATES, tl.sum(inside))
    tl.store(numbers + BY_COUNT, tl.where(by_count, k, 0))
    tl.store(numbers + MODE, tl.where(by_count | by_mass, SELECT, DRAW_KEPT))


@triton.jit
def _mass_bins(p, spread, least, most, bins):  # type: ignore[no-untyped-def]
    """First and last bin that can hold the token at which the mass reaches p, for bounds on the bins' counts.

    The mass down to a bin is bounded from its own side and, through the whole, from that of the tail: the one is sharp
    for a small p and the other for a p near 1. Bounds are widened by more than the rounding of their sums.
    """
    width = spread / BINS
    most_mass = most.to(tl.float32) * tl.exp(-width * bins) * 1.001
    least_mass = least.to(tl.float32) * tl.exp(-width * (bins + 1)) * 0.999
    most_whole, least_whole = tl.sum(most_mass), tl.sum(least_mass)
    most_tail = tl.cumsum(most_mass, 0, reverse=True) - most_mass
    least_tail = tl.cumsum(least_mass, 0, reverse=True) - least_mass
    short = (tl.cumsum(most_mass, 0) < p * least_whole) | (least_tail * 0.999 > (1.0 - p) * most_whole)
    reached = (tl.cumsum(least_mass, 0) >= p * most_whole) | (most_tail * 1.001 <= (1.0 - p) * least_whole)
    last = tl.minimum(tl.sum((reached == 0).to(tl.int32)), bins.shape[0] - 1)
    return tl.minimum(tl.sum(short.to(tl.int32)), last), last


@triton.jit  # type: ignore[untyped-decorator]
def select_kernel(  # type: ignore[no-untyped-def]
    logits, row_stride, slots, temperature, top_p,
    adjusted, candidates, chunk_tokens, chunk_mass, row_values, row_numbers, arrivals, vocab,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
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
    p, found = tl.load(top_p + slot), candidates + row * (CHUNKS * CHUNK)
    first_bin, last_bin = tl.load(numbers + FIRST_BIN), tl.load(numbers + LAST_BIN)
    before = tl.load(chunk_tokens + (row * CHUNK_TOKENS + CANDIDATES_BEFORE) * CHUNKS + chunk)
    whole, above = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for start in range(chunk * CHUNK, (chunk + 1) * CHUNK, BLOCK):
        token = start + tl.arange(0, BLOCK)
        within = token < vocab
        scores = load_scores(
            logits + row * row_stride, adjusted + row * (CHUNKS * CHUNK), tl.load(numbers + ADJUSTED) != 0, token,
            within, tl.load(values + ROW_BEST), tl.load(temperature + slot),
        )  # fmt: skip
        bins = _bins(scores, tl.load(values + ROW_RANGE))
        inside = (within & (bins >= first_bin) & (bins <= last_bin)).to(tl.int32)
        place = before + tl.cumsum(inside, 0) - 1
        tl.store(found + place, tl.abs(scores).to(tl.int32, bitcast=True), mask=inside != 0)
        before += tl.sum(inside)
        if p < 1.0:
            mass = _mass(scores)
            whole += mass
            above += tl.where(bins < first_bin, mass, 0)
    masses = chunk_mass + row * (2 * CHUNKS)
    tl.store(masses + chunk, tl.sum(whole))
    tl.store(masses + CHUNKS + chunk, tl.sum(above))
    if arrives_last(arrivals + row, CHUNKS):
        _find_thresholds(p, found, masses, values, numbers, CHUNKS, LANES, TILE)


@triton.jit  # type: ignore[untyped-decorator]
def _find_thresholds(  # type: ignore[no-untyped-def]
    p, found, masses, values, numbers, CHUNKS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr
):
    candidates, k = tl.load(numbers + CANDIDATES), tl.load(numbers + BY_COUNT)
    nearest, furthest = tl.full((), INFINITY_BITS, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, candidates, TILE):
        place = start + tl.arange(0, TILE)
        nearest = tl.minimum(nearest, tl.min(tl.load(found + place, mask=place < candidates, other=INFINITY_BITS)))
        furthest = tl.maximum(furthest, tl.max(tl.load(found + place, mask=place < candidates, other=0)))
    if k > 0:
        above = tl.load(numbers + COUNT_ABOVE).to(tl.int64)
        furthest = _bisect(found, candidates, nearest, furthest, above, k.to(tl.int64), False, TILE)
        tl.store(numbers + FURTHEST, furthest)
    if p < 1.0:
        lane = tl.arange(0, LANES)
        above = tl.sum(tl.load(masses + CHUNKS + lane, mask=lane < CHUNKS, other=0))
        whole = tl.sum(tl.load(masses + lane, mask=lane < CHUNKS, other=0))
        if k > 0:
            whole = above + _total(found, candidates, furthest, True, TILE)
        goal = (whole.to(tl.float64) * p.to(tl.float64)).to(tl.int64)
        reached = _bisect(found, candidates, nearest, furthest, above, goal, True, TILE)
        tl.store(values + ROW_LEAST_WEIGHT, tl.exp(-reached.to(tl.float32, bitcast=True)))


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
