"""Last kernel of the sampler: noise for the tokens that the filters keep, and the largest sum.

A row with filters first lists what it keeps of a chunk, so noise is computed for few tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from splitserve.kernels.gumbel import gumbel, noise_key, rough_gumbel
from splitserve.kernels.sampling_scratch import (
    ADJUSTED,
    BEST,
    CHUNK_TOKENS,
    CHUNK_VALUES,
    DEPARTED,
    DRAW,
    DRAWN,
    DRAWN_TOKEN,
    FILTERED,
    FURTHEST,
    LEAST_TEMPERATURE,
    NO_TOKEN,
    ROW_BEST,
    ROW_LEAST_WEIGHT,
    ROW_NUMBERS,
    ROW_VALUES,
    SELECT,
    arrives_last,
    best_of_chunks,
    emit,
    load_logits,
    load_scores,
    queue_length,
    queued_row,
    scores_of,
)
from splitserve.kernels.sampling_select import keeps, least_kept_score

ROUGH_MARGIN = tl.constexpr(1e-3)  # scores up to 50 and noise, each rough within 1e-4


@triton.jit  # type: ignore[untyped-decorator]
def draw_kernel(  # type: ignore[no-untyped-def]
    logits, row_stride, slots, positions,
    temperature, min_p, repetition, presence, frequency, seed, sample, logprobs, counts, tokens, logprob,
    adjusted, candidates, chunk_values, chunk_tokens, row_values, row_numbers, queues, arrivals, vocab, rows,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs draw the best of chunks; the last of a row picks the best of those."""
    if PDL:
        gdc_wait()
    if tl.program_id(0) == 0:
        tl.store(queues + SELECT * (1 + rows), 0)
    waiting = queue_length(queues, rows, DRAW)
    for item in range(tl.program_id(0), waiting * CHUNKS, tl.num_programs(0)):
        row, chunk = queued_row(queues, rows, item // CHUNKS, DRAW), item % CHUNKS
        slot = tl.load(slots + row).to(tl.int64)
        numbers, values = row_numbers + row * ROW_NUMBERS, chunk_values + row * (CHUNK_VALUES * CHUNKS) + chunk
        logits_row, adjusted_row = logits + row * row_stride, adjusted + row * (CHUNKS * CHUNK)
        is_adjusted, heat = tl.load(numbers + ADJUSTED) != 0, tl.load(temperature + slot)
        best = tl.load(row_values + row * ROW_VALUES + ROW_BEST)
        kept_ids, start = candidates + row * (CHUNKS * CHUNK) + chunk * CHUNK, chunk * CHUNK
        key = noise_key(tl.load(seed + slot), tl.load(sample + slot), tl.load(positions + row))
        if tl.load(numbers + FILTERED) == 0:
            top, token = _draw_any(
                logits_row, adjusted_row, is_adjusted, start, tl.minimum(vocab - start, CHUNK), best, heat, key,
                kept_ids, BLOCK,
            )  # fmt: skip
        else:
            number = _list_kept(
                logits_row, adjusted_row, is_adjusted, start, vocab, best, heat,
                tl.load(values + BEST * CHUNKS), tl.load(numbers + FURTHEST),
                tl.load(row_values + row * ROW_VALUES + ROW_LEAST_WEIGHT), tl.load(min_p + slot), kept_ids,
                CHUNK, BLOCK,
            )  # fmt: skip
            top, token = _draw(
                logits_row, adjusted_row, is_adjusted, start, number, best, heat, key, kept_ids, True, BLOCK
            )  # fmt: skip
        tl.store(values + DRAWN * CHUNKS, top)
        chunk_drawn = chunk_tokens + (row * CHUNK_TOKENS + DRAWN_TOKEN) * CHUNKS
        tl.store(chunk_drawn + chunk, token)
        if arrives_last(arrivals + row, CHUNKS):
            _, drawn = best_of_chunks(chunk_values + (row * CHUNK_VALUES + DRAWN) * CHUNKS, chunk_drawn, CHUNKS, LANES)
            emit(
                drawn, row, slot, logits_row, row_values, tokens, logprob, counts, logprobs, repetition, presence,
                frequency, vocab,
            )  # fmt: skip
    if waiting > 0:
        last = arrives_last(queues + DEPARTED * (1 + rows), tl.num_programs(0))
        tl.store(queues + DRAW * (1 + rows), 0, mask=last)


@triton.jit  # type: ignore[untyped-decorator]
def _draw(  # type: ignore[no-untyped-def]
    logits_row, adjusted_row, is_adjusted, start, number, best, temperature, key, ids, listed: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest sum and its lowest token, of `number` tokens from `start` on, or of those in `ids`."""
    lane = tl.arange(0, BLOCK)
    largest, drawn = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], NO_TOKEN, tl.int32)
    for first in range(0, number, BLOCK):
        within = first + lane < number
        token = start + first + lane
        if listed:
            token = tl.load(ids + first + lane, mask=within, other=0)
        scores = load_scores(logits_row, adjusted_row, is_adjusted, token, within, best, temperature)
        value = tl.where(within, scores + gumbel(key, token), float("-inf"))
        drawn = tl.where(value > largest, token, drawn)
        largest = tl.maximum(value, largest)
    top = tl.max(largest)
    return top, tl.min(tl.where(largest == top, drawn, NO_TOKEN))


@triton.jit  # type: ignore[untyped-decorator]
def _draw_any(  # type: ignore[no-untyped-def]
    logits_row, adjusted_row, is_adjusted, start, number, best, temperature, key, ids, BLOCK: tl.constexpr
):
    """What `_draw` finds among `number` tokens from `start` on, by rough sums first.

    Every lane keeps the token of its largest rough sum. Unless another of its tokens comes as near to the largest of
    all as rough sums may err, the winner is one that was kept, and only those need exact noise.
    """
    lane = tl.arange(0, BLOCK)
    largest, drawn = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], NO_TOKEN, tl.int32)
    second, inverse = largest, 1.0 / tl.maximum(temperature, LEAST_TEMPERATURE)
    for first in range(0, number, BLOCK):
        token = start + first + lane
        logits = load_logits(logits_row, adjusted_row, is_adjusted, token, first + lane < number)
        value = (logits - best) * inverse + rough_gumbel(key, token)
        second = tl.maximum(second, tl.minimum(value, largest))
        drawn = tl.where(value > largest, token, drawn)
        largest = tl.maximum(value, largest)
    enough = tl.max(largest) - ROUGH_MARGIN
    if tl.max(second) >= enough:
        top, token = _draw(
            logits_row, adjusted_row, is_adjusted, start, number, best, temperature, key, ids, False, BLOCK
        )  # fmt: skip
    else:
        likely = (largest >= enough) & (drawn != NO_TOKEN)
        scores = load_scores(logits_row, adjusted_row, is_adjusted, drawn, likely, best, temperature)
        sums = tl.where(likely, scores + gumbel(key, drawn), float("-inf"))
        top = tl.max(sums)
        token = tl.min(tl.where(sums == top, drawn, NO_TOKEN))
    return top, token


@triton.jit  # type: ignore[untyped-decorator]
def _list_kept(  # type: ignore[no-untyped-def]
    logits_row, adjusted_row, is_adjusted, start, vocab, best, temperature, chunk_best, furthest, least_weight, min_p,
    kept_ids, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the ids that the filters keep of a chunk to `kept_ids`, ascending; returns how many there are."""
    least_score = least_kept_score(min_p)
    number = tl.full((), 0, tl.int32)
    highest = scores_of(chunk_best, best, temperature)
    if keeps(highest, furthest, least_weight, least_score):
        for first in range(start, start + CHUNK, BLOCK):
            token = first + tl.arange(0, BLOCK)
            within = token < vocab
            scores = load_scores(logits_row, adjusted_row, is_adjusted, token, within, best, temperature)
            kept = (within & keeps(scores, furthest, least_weight, least_score)).to(tl.int32)
            tl.store(kept_ids + number + tl.cumsum(kept, 0) - 1, token, mask=kept != 0)
            number += tl.sum(kept)
        tl.debug_barrier()  # the ids are read by other threads than wrote them
    return number
