"""Where thresholds of top-k and top-p can lie, without sorting, for the rows that have such filters.

With distance (best - logit) / temperature, tokens are counted in bins of distance between the best and the worst.
Counts tell the bin of the k-th token, and bound the mass of every bin, so that only a few bins are left in which the
mass can reach p. Distances are rough here, but the same wherever they choose a bin.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from splitserve.kernels.sampling_scan import MAX_RANGE
from splitserve.kernels.sampling_scratch import (
    ADJUST,
    ADJUSTED,
    BINS,
    BY_COUNT,
    CHUNK_VALUES,
    COUNT_ABOVE,
    FIRST_BIN,
    LAST_BIN,
    LEAST_TEMPERATURE,
    ROW_BEST,
    ROW_NUMBERS,
    ROW_RANGE,
    ROW_VALUES,
    SELECT,
    WHOLE,
    arrives_last,
    load_logits,
    queue_length,
    queued_row,
)


@triton.jit
def rough_distance(logits, best, temperature):  # type: ignore[no-untyped-def]
    return (best - logits) * (1.0 / tl.maximum(temperature, LEAST_TEMPERATURE))


@triton.jit
def bin_of(distance, spread):  # type: ignore[no-untyped-def]
    return tl.minimum(distance * (BINS / spread), BINS - 1.0).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def histogram_kernel(  # type: ignore[no-untyped-def]
    logits, row_stride, slots, temperature, top_k, top_p,
    adjusted, histogram, chunk_values, row_values, row_numbers, queues, arrivals, vocab, rows,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs count the tokens of chunks by distance; the last of a row picks the bins to look at."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if tl.program_id(0) == 0:
        tl.store(queues + ADJUST * (1 + rows), 0)
    for item in range(tl.program_id(0), queue_length(queues, rows, SELECT) * CHUNKS, tl.num_programs(0)):
        row, chunk = queued_row(queues, rows, item // CHUNKS, SELECT), item % CHUNKS
        numbers, values = row_numbers + row * ROW_NUMBERS, row_values + row * ROW_VALUES
        slot = tl.load(slots + row).to(tl.int64)
        k, p, spread = tl.load(top_k + slot), tl.load(top_p + slot), tl.load(values + ROW_RANGE)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        x = load_logits(
            logits + row * row_stride, adjusted + row * (CHUNKS * CHUNK), tl.load(numbers + ADJUSTED) != 0, token,
            token < vocab,
        )  # fmt: skip
        distance = rough_distance(x, tl.load(values + ROW_BEST), tl.load(temperature + slot))
        counts = tl.histogram(bin_of(distance, spread), BINS, mask=token < vocab)
        tl.store(histogram + (row * CHUNKS + chunk) * BINS + tl.arange(0, BINS), counts)
        if p < 1.0:
            tl.store(chunk_values + (row * CHUNK_VALUES + WHOLE) * CHUNKS + chunk, tl.sum(tl.exp(-distance)))
        if arrives_last(arrivals + row, CHUNKS):
            _pick_bins(k, p, spread, histogram + row * (CHUNKS * BINS), numbers, vocab, CHUNK // 4, CHUNKS, LANES)


@triton.jit  # type: ignore[untyped-decorator]
def _pick_bins(  # type: ignore[no-untyped-def]
    k, p, spread, histogram, numbers, vocab, few: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr
):
    """The bins that may hold a threshold, and those above them if that makes no more than `few` tokens."""
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
    all_few = tl.sum(tl.where(bins <= last, counts, 0)) <= few
    first = tl.where(all_few, 0, tl.minimum(first, last))
    tl.store(numbers + FIRST_BIN, first)
    tl.store(numbers + LAST_BIN, tl.where(by_count | by_mass, last, -1))
    tl.store(numbers + COUNT_ABOVE, tl.sum(tl.where(bins < first, counts, 0)))
    tl.store(numbers + BY_COUNT, tl.where(by_count, k, 0))


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
