"""Last kernel of the sampler: noise for the tokens that the filters keep, and the largest sum.

A row with filters first lists what it keeps of a chunk, so noise is computed for few tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from splitserve.kernels.gumbel import gumbel, noise_key
from splitserve.kernels.sampling_scratch import (
    ADJUSTED,
    BEST,
    CHUNK_TOKENS,
    CHUNK_VALUES,
    DONE,
    DRAW,
    DRAWN,
    DRAWN_TOKEN,
    FURTHEST,
    MODE,
    NO_TOKEN,
    ROW_BEST,
    ROW_LEAST_WEIGHT,
    ROW_NUMBERS,
    ROW_VALUES,
    arrives_last,
    best_of_chunks,
    emit,
    load_scores,
)


@triton.jit  # type: ignore[untyped-decorator]
def draw_kernel(  # type: ignore[no-untyped-def]
    logits, row_stride, slots, positions,
    temperature, min_p, repetition, presence, frequency, seed, sample, logprobs, counts, tokens, logprob,
    adjusted, candidates, chunk_values, chunk_tokens, row_values, row_numbers, arrivals, vocab,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (chunk, row) draws the best of a chunk; the last of a row picks the best of those."""
    if PDL:
        gdc_wait()
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    numbers = row_numbers + row * ROW_NUMBERS
    mode = tl.load(numbers + MODE)
    if mode == DONE:
        return
    slot = tl.load(slots + row).to(tl.int64)
    logits_row, adjusted_row = logits + row * row_stride, adjusted + row * (CHUNKS * CHUNK)
    is_adjusted, heat = tl.load(numbers + ADJUSTED) != 0, tl.load(temperature + slot)
    best = tl.load(row_values + row * ROW_VALUES + ROW_BEST)
    kept_ids, start = candidates + row * (CHUNKS * CHUNK) + chunk * CHUNK, chunk * CHUNK
    number = tl.minimum(vocab - start, CHUNK)
    values = chunk_values + row * (CHUNK_VALUES * CHUNKS) + chunk
    if mode != DRAW:
        number = _list_kept(
            logits_row, adjusted_row, is_adjusted, start, vocab, best, heat,
            tl.load(values + BEST * CHUNKS), tl.load(numbers + FURTHEST),
            tl.load(row_values + row * ROW_VALUES + ROW_LEAST_WEIGHT), tl.load(min_p + slot), kept_ids, CHUNK, BLOCK,
        )  # fmt: skip

    key = noise_key(tl.load(seed + slot), tl.load(sample + slot), tl.load(positions + row))
    lane = tl.arange(0, BLOCK)
    largest, drawn = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], NO_TOKEN, tl.int32)
    for first in range(0, number, BLOCK):
        within = first + lane < number
        token = start + first + lane
        if mode != DRAW:
            token = tl.load(kept_ids + first + lane, mask=within, other=0)
        scores = load_scores(logits_row, adjusted_row, is_adjusted, token, within, best, heat)
        value = tl.where(within, scores + gumbel(key, token), float("-inf"))
        drawn = tl.where(value > largest, token, drawn)
        largest = tl.maximum(value, largest)
    top = tl.max(largest)
    tl.store(values + DRAWN * CHUNKS, top)
    chunk_drawn = chunk_tokens + row * (CHUNK_TOKENS * CHUNKS) + DRAWN_TOKEN * CHUNKS
    tl.store(chunk_drawn + chunk, tl.min(tl.where(largest == top, drawn, NO_TOKEN)))
    if arrives_last(arrivals + row, CHUNKS):
        _, token = best_of_chunks(
            chunk_values + row * (CHUNK_VALUES * CHUNKS) + DRAWN * CHUNKS, chunk_drawn, CHUNKS, LANES
        )
        emit(
            token, row, slot, logits_row, row_values, tokens, logprob, counts, logprobs, repetition, presence,
            frequency, vocab,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _list_kept(  # type: ignore[no-untyped-def]
    logits_row, adjusted_row, is_adjusted, start, vocab, best, temperature, chunk_best, furthest, least_weight, min_p,
    kept_ids, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the ids that the filters keep of a chunk to `kept_ids`, ascending; returns how many there are."""
    least_score = tl.log(tl.where(min_p > 0.0, min_p, 1.0).to(tl.float64)).to(tl.float32)
    least_score = tl.where(min_p > 0.0, least_score, float("-inf"))
    number = tl.full((), 0, tl.int32)
    highest = tl.div_rn(chunk_best - best, tl.maximum(temperature, 1.1754943508222875e-38))
    if _keeps(highest, furthest, least_weight, least_score):
        for first in range(start, start + CHUNK, BLOCK):
            token = first + tl.arange(0, BLOCK)
            within = token < vocab
            scores = load_scores(logits_row, adjusted_row, is_adjusted, token, within, best, temperature)
            kept = (within & _keeps(scores, furthest, least_weight, least_score)).to(tl.int32)
            tl.store(kept_ids + number + tl.cumsum(kept, 0) - 1, token, mask=kept != 0)
            number += tl.sum(kept)
        tl.debug_barrier()  # the ids are read by other threads than wrote them
    return number


@triton.jit
def _keeps(scores, furthest, least_weight, least_score):  # type: ignore[no-untyped-def]
    distance = tl.abs(scores).to(tl.int32, bitcast=True)
    return (distance <= furthest) & (tl.exp(scores) >= least_weight) & (scores >= least_score)
