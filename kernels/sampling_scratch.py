"""What the sampler's kernels leave for each other: chunks of a row, then the row, then the next kernel.

A row's vocabulary is cut into chunks, a program each, at places that depend on nothing but the vocabulary. Whichever
program of a row comes last folds what all of them left, in the order of chunks, and puts the row on the queue of the
kernel that has to go on with it. Queues fill in any order, which decides who computes a row and no bit of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

CHUNK = 4096
BINS = tl.constexpr(128)
TOP = 20
TOP_LANES = tl.constexpr(32)
NO_TOKEN = tl.constexpr(0x7FFFFFFF)
LEAST_TEMPERATURE = tl.constexpr(2.0**-126)  # the least normal float32

# Queues [4, 1 + rows]: how many rows wait, and which. DEPARTED counts programs that read the last queue.
ADJUST = tl.constexpr(0)
SELECT = tl.constexpr(1)
DRAW = tl.constexpr(2)
DEPARTED = tl.constexpr(3)

# Planes of chunk_values [rows, 6, chunks] and chunk_tokens [rows, 2, chunks].
BEST = tl.constexpr(0)
LEAST = tl.constexpr(1)
RAW_BEST = tl.constexpr(2)
RAW_SUM = tl.constexpr(3)
DRAWN = tl.constexpr(4)
WHOLE = tl.constexpr(5)
CHUNK_VALUES = tl.constexpr(6)
BEST_TOKEN = tl.constexpr(0)
DRAWN_TOKEN = tl.constexpr(1)
CHUNK_TOKENS = tl.constexpr(2)

# Places in row_values [rows, 5] and row_numbers [rows, 8].
ROW_BEST = tl.constexpr(0)
ROW_RANGE = tl.constexpr(1)
ROW_RAW_BEST = tl.constexpr(2)
ROW_RAW_LOG = tl.constexpr(3)
ROW_LEAST_WEIGHT = tl.constexpr(4)
ROW_VALUES = tl.constexpr(5)
ADJUSTED = tl.constexpr(0)
FILTERED = tl.constexpr(1)
FURTHEST = tl.constexpr(2)
FIRST_BIN = tl.constexpr(3)
LAST_BIN = tl.constexpr(4)
COUNT_ABOVE = tl.constexpr(5)
CANDIDATES = tl.constexpr(6)
BY_COUNT = tl.constexpr(7)
ROW_NUMBERS = tl.constexpr(8)


@dataclass(frozen=True, eq=False)
class SamplerScratch:
    """Working memory for up to `rows` rows. `queues` and `arrivals` are 0 between calls, the rest means nothing then.

    `adjusted` float32 and `candidates` int32 [rows, chunks * chunk]; `histogram` int32 [rows, chunks, BINS];
    `chunk_values` float32, `chunk_tokens` int32, `row_values` float32 and `row_numbers` int32 by the planes above;
    `mass_above` int64 [rows, chunks]: of what lies above the candidates; `top_values` float32 and `top_tokens` int32
    [rows, chunks, TOP_LANES]; `queues` int32 [4, 1 + rows]; `arrivals` int32 [rows].
    """

    adjusted: torch.Tensor
    candidates: torch.Tensor
    histogram: torch.Tensor
    chunk_values: torch.Tensor
    chunk_tokens: torch.Tensor
    mass_above: torch.Tensor
    top_values: torch.Tensor
    top_tokens: torch.Tensor
    row_values: torch.Tensor
    row_numbers: torch.Tensor
    queues: torch.Tensor
    arrivals: torch.Tensor
    chunk: int

    @property
    def rows(self) -> int:
        return self.adjusted.shape[0]

    @property
    def chunks(self) -> int:
        return self.histogram.shape[1]


def new_sampler_scratch(rows: int, vocab: int, device: torch.device, chunk: int = CHUNK) -> SamplerScratch:
    """Memory for `sample_rows`, 8 bytes a row and token; `chunk` tokens, a power of two, go to one program."""
    chunks = triton.cdiv(vocab, chunk)

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return SamplerScratch(
        adjusted=new(rows, chunks * chunk, dtype=torch.float32),
        candidates=new(rows, chunks * chunk, dtype=torch.int32),
        histogram=new(rows, chunks, BINS.value, dtype=torch.int32),
        chunk_values=new(rows, CHUNK_VALUES.value, chunks, dtype=torch.float32),
        chunk_tokens=new(rows, CHUNK_TOKENS.value, chunks, dtype=torch.int32),
        mass_above=new(rows, chunks, dtype=torch.int64),
        top_values=new(rows, chunks, TOP_LANES.value, dtype=torch.float32),
        top_tokens=new(rows, chunks, TOP_LANES.value, dtype=torch.int32),
        row_values=new(rows, ROW_VALUES.value, dtype=torch.float32),
        row_numbers=new(rows, ROW_NUMBERS.value, dtype=torch.int32),
        queues=torch.zeros(4, 1 + rows, dtype=torch.int32, device=device),
        arrivals=torch.zeros(rows, dtype=torch.int32, device=device),
        chunk=chunk,
    )


@triton.jit
def arrives_last(arrivals, programs):  # type: ignore[no-untyped-def]
    """Whether this is the last of `programs` to come here; it then sees what all of them stored before."""
    tl.debug_barrier()
    before = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
    last = before == programs - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit  # type: ignore[untyped-decorator]
def queue_length(queues, rows, queue: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(queues + queue * (1 + rows))


@triton.jit  # type: ignore[untyped-decorator]
def queued_row(queues, rows, place, queue: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(queues + queue * (1 + rows) + 1 + place).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def push(queues, rows, row, queue: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.atomic_add(queues + queue * (1 + rows), 1, sem="relaxed")
    tl.store(queues + queue * (1 + rows) + 1 + place, row.to(tl.int32))


@triton.jit
def load_logits(logits_row, adjusted_row, is_adjusted, tokens, mask):  # type: ignore[no-untyped-def]
    """Float32 logits of `tokens`, adjusted if the row's are, -inf where masked."""
    if is_adjusted:
        values = tl.load(adjusted_row + tokens, mask=mask, other=float("-inf"))
    else:
        values = tl.load(logits_row + tokens, mask=mask, other=float("-inf")).to(tl.float32)
    return values


@triton.jit
def load_scores(logits_row, adjusted_row, is_adjusted, tokens, mask, best, temperature):  # type: ignore[no-untyped-def]
    """(logit - best) / temperature of `tokens`, -inf where masked: never above 0, and 0 for the best."""
    return scores_of(load_logits(logits_row, adjusted_row, is_adjusted, tokens, mask), best, temperature)


@triton.jit
def scores_of(logits, best, temperature):  # type: ignore[no-untyped-def]
    return tl.div_rn(logits - best, tl.maximum(temperature, LEAST_TEMPERATURE))


@triton.jit  # type: ignore[untyped-decorator]
def best_of_chunks(values, tokens, chunks: tl.constexpr, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest of a row's `values` [chunks] and the lowest of the `tokens` that have it; NaN counts as nothing."""
    lane = tl.arange(0, lanes)
    found = tl.load(values + lane, mask=lane < chunks, other=float("-inf"))
    best = tl.max(tl.where(found == found, found, float("-inf")))
    token = tl.load(tokens + lane, mask=lane < chunks, other=NO_TOKEN)
    return best, tl.min(tl.where(found == best, token, NO_TOKEN))


@triton.jit
def emit(  # type: ignore[no-untyped-def]
    token, row, slot, logits_row, row_values, tokens, logprob, counts, logprobs, repetition, presence, frequency, vocab
):  # fmt: skip
    """Write a row's token, its log probability if the slot wants it, and count it if the slot has penalties."""
    tl.store(tokens + row, token.to(tl.int64))
    if tl.load(logprobs + slot) >= 0:
        values = row_values + row * ROW_VALUES
        value = tl.load(logits_row + token).to(tl.float32)
        tl.store(logprob + row, value - tl.load(values + ROW_RAW_BEST) - tl.load(values + ROW_RAW_LOG))
    if penalised(tl.load(repetition + slot), tl.load(presence + slot), tl.load(frequency + slot)):
        count = tl.load(counts + slot * vocab + token).to(tl.int32)
        tl.store(counts + slot * vocab + token, (count + ((count & 0x7FFF) < 0x7FFF)).to(tl.int16))


@triton.jit
def penalised(repetition, presence, frequency):  # type: ignore[no-untyped-def]
    return (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0)
