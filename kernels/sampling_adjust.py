"""The sampler's rows that change their logits before temperature, or want log probabilities.

Changed logits are left in `adjusted` for later kernels. Log probabilities are those of the logits as they came.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from splitserve.kernels.sampling_scan import selects, store_best, sum_up
from splitserve.kernels.sampling_scratch import (
    ADJUST,
    CHUNK_VALUES,
    NO_TOKEN,
    RAW_BEST,
    RAW_SUM,
    ROW_RAW_BEST,
    ROW_RAW_LOG,
    ROW_VALUES,
    TOP_LANES,
    arrives_last,
    emit,
    penalised,
    queue_length,
    queued_row,
)

BIAS_BLOCK = tl.constexpr(128)


@triton.jit  # type: ignore[untyped-decorator]
def adjust_kernel(  # type: ignore[no-untyped-def]
    logits, row_stride, slots, positions,
    temperature, top_k, top_p, min_p, repetition, presence, frequency, logprobs,
    bias_ids, bias_values, bias_until, bias_count, counts, grammar, mask,
    tokens, finite, logprob, top_ids, top_logprobs,
    adjusted, chunk_values, chunk_tokens, top_values, top_tokens, row_values, row_numbers, queues, arrivals,
    vocab, rows, max_biases, mask_words,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Programs take the chunks of queued rows in turn; the last of a row sums up."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for item in range(tl.program_id(0), queue_length(queues, rows, ADJUST) * CHUNKS, tl.num_programs(0)):
        row, chunk = queued_row(queues, rows, item // CHUNKS, ADJUST), item % CHUNKS
        slot = tl.load(slots + row).to(tl.int64)
        logits_row, adjusted_row = logits + row * row_stride, adjusted + row * (CHUNKS * CHUNK)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        wanted = tl.minimum(tl.load(logprobs + slot), TOP)
        x = tl.load(logits_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        if wanted >= 0:
            values, raw_best = chunk_values + row * (CHUNK_VALUES * CHUNKS) + chunk, tl.max(x)
            tl.store(values + RAW_BEST * CHUNKS, raw_best)
            tl.store(values + RAW_SUM * CHUNKS, tl.sum(tl.exp(x - tl.where(raw_best == float("-inf"), 0.0, raw_best))))
            _store_top(x, token, top_values, top_tokens, row * CHUNKS + chunk, wanted)

        repeated, present, frequent = tl.load(repetition + slot), tl.load(presence + slot), tl.load(frequency + slot)
        biases, masked = tl.load(bias_count + slot), tl.load(grammar + slot) != 0
        adjusts = penalised(repeated, present, frequent) | (biases > 0) | masked
        if adjusts:
            _adjust(
                logits_row, adjusted_row, bias_ids + slot * max_biases, bias_values + slot * max_biases,
                bias_until + slot * max_biases, biases, tl.load(positions + row), counts + slot * vocab,
                mask + slot * mask_words, repeated, present, frequent, masked, chunk * CHUNK, vocab, CHUNK, BLOCK,
            )  # fmt: skip
            x = tl.load(adjusted_row + token)
        store_best(x, token, row, chunk, selects(top_k, top_p, slot, vocab), chunk_values, chunk_tokens, CHUNKS)
        if arrives_last(arrivals + row, CHUNKS):
            best_token, chosen = sum_up(
                row, slot, adjusts, temperature, top_k, top_p, min_p, finite, chunk_values, chunk_tokens, row_values,
                row_numbers, queues, vocab, rows, CHUNKS, LANES,
            )  # fmt: skip
            if wanted >= 0:
                _sum_up_logprobs(
                    row, wanted, top_ids, top_logprobs, chunk_values + row * (CHUNK_VALUES * CHUNKS),
                    row_values + row * ROW_VALUES, top_values, top_tokens, CHUNKS, LANES, TOP,
                )  # fmt: skip
                tl.debug_barrier()  # `emit` reads the row's sums
            if chosen:
                emit(
                    best_token, row, slot, logits_row, row_values, tokens, logprob, counts, logprobs, repetition,
                    presence, frequency, vocab,
                )  # fmt: skip


@triton.jit
def _penalise(x, counts_row, token, mask, repetition, presence, frequency):  # type: ignore[no-untyped-def]
    if penalised(repetition, presence, frequency):
        count = tl.load(counts_row + token, mask=mask, other=0).to(tl.int32)
        generated = count & 0x7FFF
        x = tl.where(count != 0, tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition), x)
        x = tl.where(generated > 0, x - (presence + frequency * generated.to(tl.float32)), x)
    return x


@triton.jit
def _bar(x, mask_row, token, mask, masked):  # type: ignore[no-untyped-def]
    if masked:
        word = tl.load(mask_row + token // 32, mask=mask, other=0)
        x = tl.where(((word >> (token % 32)) & 1) != 0, x, float("-inf"))
    return x


@triton.jit  # type: ignore[untyped-decorator]
def _adjust(  # type: ignore[no-untyped-def]
    logits_row, adjusted_row, ids, biases, until, number, position, counts_row, mask_row,
    repetition, presence, frequency, masked, start, vocab, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Penalise and bar a chunk, do its biased tokens again from the start, and last bar those that -inf bars."""
    for first in range(start, start + CHUNK, BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = tl.load(logits_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        x = _penalise(x, counts_row, token, token < vocab, repetition, presence, frequency)
        tl.store(adjusted_row + token, _bar(x, mask_row, token, token < vocab, masked))
    tl.debug_barrier()  # what other threads of this program stored
    for bars in tl.static_range(2):
        for first in range(0, number, BIAS_BLOCK):
            entry = first + tl.arange(0, BIAS_BLOCK)
            token = tl.load(ids + entry, mask=entry < number, other=-1)
            bias = tl.load(biases + entry, mask=entry < number, other=0.0)
            live = (position < tl.load(until + entry, mask=entry < number, other=0)) & (entry < number)
            live = live & (token >= start) & (token < start + CHUNK)
            live = live & ((bias == float("-inf")) == (bars == 1))
            if bars == 0:
                x = tl.load(logits_row + token, mask=live, other=0.0).to(tl.float32) + bias
                x = _penalise(x, counts_row, token, live, repetition, presence, frequency)
                tl.store(adjusted_row + token, _bar(x, mask_row, token, live, masked), mask=live)
            else:
                tl.store(adjusted_row + token, bias, mask=live)
        tl.debug_barrier()


@triton.jit
def _store_top(x, token, top_values, top_tokens, place, wanted):  # type: ignore[no-untyped-def]
    """The `wanted` largest of a chunk, descending."""
    lane = tl.arange(0, TOP_LANES)
    found, found_token = tl.full([TOP_LANES], float("-inf"), tl.float32), tl.full([TOP_LANES], NO_TOKEN, tl.int32)
    for index in range(wanted):
        largest = tl.max(x)
        its_token = tl.min(tl.where(x == largest, token, NO_TOKEN))
        found = tl.where(lane == index, largest, found)
        found_token = tl.where(lane == index, its_token, found_token)
        x = tl.where(token == its_token, float("-inf"), x)
    tl.store(top_values + place * TOP_LANES + lane, found)
    tl.store(top_tokens + place * TOP_LANES + lane, found_token)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_up_logprobs(  # type: ignore[no-untyped-def]
    row, wanted, top_ids, top_logprobs, values, folded, top_values, top_tokens,
    CHUNKS: tl.constexpr, LANES: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """The row's log of the sum of exponentials, and its `wanted` likeliest tokens."""
    lane = tl.arange(0, LANES)
    bests = tl.load(values + RAW_BEST * CHUNKS + lane, mask=lane < CHUNKS, other=float("-inf"))
    sums = tl.load(values + RAW_SUM * CHUNKS + lane, mask=lane < CHUNKS, other=0.0)
    best = tl.max(bests)
    log = tl.log(tl.sum(tl.exp(bests - best) * sums))
    tl.store(folded + ROW_RAW_BEST, best)
    tl.store(folded + ROW_RAW_LOG, log)
    place = tl.arange(0, LANES * TOP_LANES)
    x = tl.load(top_values + row * (CHUNKS * TOP_LANES) + place, mask=place < CHUNKS * TOP_LANES, other=float("-inf"))
    token = tl.load(top_tokens + row * (CHUNKS * TOP_LANES) + place, mask=place < CHUNKS * TOP_LANES, other=NO_TOKEN)
    for index in range(wanted):
        largest = tl.max(x)
        its_token = tl.min(tl.where(x == largest, token, NO_TOKEN))
        tl.store(top_ids + row * TOP + index, its_token)
        tl.store(top_logprobs + row * TOP + index, largest - best - log)
        x = tl.where(token == its_token, float("-inf"), x)
