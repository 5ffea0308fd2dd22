"""First kernel of the sampler: the best logit of rows that take their logits as they are.

A greedy row is finished here, in one pass over its logits. Rows that change their logits first, or want log
probabilities, are put on a queue.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from splitserve.kernels.sampling_scratch import (
    ADJUST,
    ADJUSTED,
    BEST,
    BEST_TOKEN,
    CANDIDATES,
    CHUNK_TOKENS,
    CHUNK_VALUES,
    DRAW,
    FILTERED,
    FURTHEST,
    LEAST,
    LEAST_TEMPERATURE,
    NO_TOKEN,
    ROW_BEST,
    ROW_LEAST_WEIGHT,
    ROW_NUMBERS,
    ROW_RANGE,
    ROW_VALUES,
    SELECT,
    arrives_last,
    best_of_chunks,
    penalised,
    push,
)

# Noise lies between -2.9 and 43.7: what is this far below the best can never be drawn, and weighs nothing.
MAX_RANGE = tl.constexpr(48.0)


@triton.jit  # type: ignore[untyped-decorator]
def scan_kernel(  # type: ignore[no-untyped-def]
    logits, row_stride, slots, live_rows,
    temperature, top_k, top_p, min_p, repetition, presence, frequency, logprobs, bias_count, grammar,
    tokens, finite, chunk_values, chunk_tokens, row_values, row_numbers, queues, arrivals, vocab, rows,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (chunk, row) scans a chunk; the last of a row sums up."""
    if PDL:
        gdc_launch_dependents()
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if row >= tl.load(live_rows):
        return
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * row_stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    penalises = penalised(tl.load(repetition + slot), tl.load(presence + slot), tl.load(frequency + slot))
    changes = penalises | (tl.load(bias_count + slot) > 0) | (tl.load(grammar + slot) != 0)
    if changes | (tl.load(logprobs + slot) >= 0):
        if chunk == 0:
            push(queues, rows, row, ADJUST)
        return
    store_best(x, token, row, chunk, selects(top_k, top_p, slot, vocab), chunk_values, chunk_tokens, CHUNKS)
    if arrives_last(arrivals + row, CHUNKS):
        best_token, chosen = sum_up(
            row, slot, False, temperature, top_k, top_p, min_p, finite, chunk_values, chunk_tokens, row_values,
            row_numbers, queues, vocab, rows, CHUNKS, LANES,
        )  # fmt: skip
        if chosen:
            tl.store(tokens + row, best_token.to(tl.int64))


@triton.jit
def selects(top_k, top_p, slot, vocab):  # type: ignore[no-untyped-def]
    """Whether a slot's filters need a threshold that depends on all tokens."""
    k = tl.load(top_k + slot)
    return ((k > 0) & (k < vocab)) | (tl.load(top_p + slot) < 1.0)


@triton.jit  # type: ignore[untyped-decorator]
def store_best(  # type: ignore[no-untyped-def]
    x, token, row, chunk, with_least, chunk_values, chunk_tokens, CHUNKS: tl.constexpr
):
    """A chunk's largest logit, NaN if one is, the lowest token that has it, and its least finite logit."""
    values = chunk_values + row * (CHUNK_VALUES * CHUNKS) + chunk
    best = tl.max(x)
    best_token = tl.min(tl.where(x == best, token, NO_TOKEN))
    broken = tl.max((x != x).to(tl.int32))
    tl.store(values + BEST * CHUNKS, tl.where(broken != 0, float("nan"), best))
    tl.store(chunk_tokens + (row * CHUNK_TOKENS + BEST_TOKEN) * CHUNKS + chunk, best_token)
    if with_least:
        tl.store(values + LEAST * CHUNKS, tl.min(tl.where(x > float("-inf"), x, float("inf"))))


@triton.jit  # type: ignore[untyped-decorator]
def sum_up(  # type: ignore[no-untyped-def]
    row, slot, adjusts, temperature, top_k, top_p, min_p, finite, chunk_values, chunk_tokens, row_values, row_numbers,
    queues, vocab, rows, CHUNKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Fold a row's chunks. Returns its best token and whether that is the row's; queues the row if it must draw."""
    values, folded = chunk_values + row * (CHUNK_VALUES * CHUNKS), row_values + row * ROW_VALUES
    numbers, lane = row_numbers + row * ROW_NUMBERS, tl.arange(0, LANES)
    bests = tl.load(values + BEST * CHUNKS + lane, mask=lane < CHUNKS, other=float("-inf"))
    best, token = best_of_chunks(
        values + BEST * CHUNKS, chunk_tokens + (row * CHUNK_TOKENS + BEST_TOKEN) * CHUNKS, CHUNKS, LANES
    )
    is_finite = (tl.max((bests != bests).to(tl.int32)) == 0) & (tl.abs(best) < float("inf"))
    tl.store(finite + row, is_finite.to(tl.int32))
    heat = tl.load(temperature + slot)
    if is_finite & (heat > 0.0):
        tl.store(folded + ROW_BEST, best)
        tl.store(folded + ROW_LEAST_WEIGHT, 0.0)
        tl.store(numbers + ADJUSTED, adjusts)
        tl.store(numbers + FURTHEST, 0x7FFFFFFF)
        tl.store(numbers + CANDIDATES, 0)
        filters = selects(top_k, top_p, slot, vocab)
        tl.store(numbers + FILTERED, filters | (tl.load(min_p + slot) > 0.0))
        if filters:
            least = tl.min(tl.load(values + LEAST * CHUNKS + lane, mask=lane < CHUNKS, other=float("inf")))
            spread = tl.div_rn(best - least, tl.maximum(heat, LEAST_TEMPERATURE))
            tl.store(folded + ROW_RANGE, tl.minimum(tl.maximum(spread, 1e-30), MAX_RANGE))
            push(queues, rows, row, SELECT)
        else:
            push(queues, rows, row, DRAW)
    return token, is_finite & (heat <= 0.0)
