"""The sampler on a GPU: what `engine.sampler.sample` decides, as five kernels without a host round trip.

    scan       the best token                                        all rows but those of `adjust`
    adjust     bias, penalties, bars, log probabilities, and scan    rows that ask for such
    histogram  count tokens by their distance from the best          rows with top-k or top-p
    select     thresholds among the few that can be one, and draw    rows with top-k or top-p
    draw       noise for what is left, take the largest              other rows with a temperature

Grids depend on the shapes alone and queues filled on the device say what a kernel has to do, so one CUDA graph serves
all requests.
A row's bits depend on its own logits, slot and position: not on its place, its neighbours or their number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from splitserve.kernels.launch import num_sms
from splitserve.kernels.sampling_adjust import adjust_kernel
from splitserve.kernels.sampling_bins import histogram_kernel
from splitserve.kernels.sampling_draw import draw_kernel
from splitserve.kernels.sampling_scan import scan_kernel
from splitserve.kernels.sampling_scratch import TOP, SamplerScratch
from splitserve.kernels.sampling_select import select_kernel

BARRED_FOREVER = 2**31 - 1
BLOCK, WARPS, PROGRAMS_PER_SM = 512, 4, 12
SCAN_WARPS, SCAN_REGISTERS = 8, 48


@dataclass(frozen=True, eq=False)
class SamplerState:
    """What each slot asks of the sampler: contiguous device tensors, [slots] unless said.

    `temperature` float32, 0 for greedy; `top_k` int32, 0 for off; `top_p` and `min_p` float32, 1 and 0 for off;
    `repetition_penalty`, `presence_penalty` and `frequency_penalty` float32, 1, 0 and 0 for off; `seed` and `sample`
    int64. `logprobs` int32: -1 for none, else how many of the likeliest tokens to report, up to 20.

    `bias_ids` int32, `bias_values` float32, `bias_until` int32 [slots, biases], `bias_count` int32: entry i of the
    first `bias_count` is added to the logit of its token while the new token's position is below `bias_until`. A value
    of -inf bars the token, after penalties. A token may occur once with a finite value and once with -inf.

    `counts` int16 [slots, vocab]: bit 15 for a token of the prompt, below it how often it was generated (saturating).
    The sampler counts what it chooses for slots that have penalties. `grammar` int32: 1 if only the tokens may come
    whose bit is set in `mask` int32 [slots, ceil(vocab / 32)].
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition_penalty: torch.Tensor
    presence_penalty: torch.Tensor
    frequency_penalty: torch.Tensor
    seed: torch.Tensor
    sample: torch.Tensor
    logprobs: torch.Tensor
    bias_ids: torch.Tensor
    bias_values: torch.Tensor
    bias_until: torch.Tensor
    bias_count: torch.Tensor
    counts: torch.Tensor
    grammar: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, eq=False)
class SampledRows:
    """What the sampler chose, [rows] unless said.

    `tokens` int64; `finite` int32, 0 where the best logit is not finite: there is no token then and nothing else of
    the row is written. `logprob` float32, and `top_ids` int32 and `top_logprobs` float32 [rows, 20], descending, the
    lower id first among equals, hold what the slot asked for; the rest of them is left as it was.
    """

    tokens: torch.Tensor
    finite: torch.Tensor
    logprob: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def new_sampler_state(slots: int, vocab: int, device: torch.device, biases: int = 1280) -> SamplerState:
    """Greedy slots that ask for nothing, with room for `biases` entries each (1,024 biases and 256 bars)."""

    def full(value: float, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.full((slots, *shape), value, dtype=dtype, device=device)

    return SamplerState(
        temperature=full(0, torch.float32),
        top_k=full(0, torch.int32),
        top_p=full(1, torch.float32),
        min_p=full(0, torch.float32),
        repetition_penalty=full(1, torch.float32),
        presence_penalty=full(0, torch.float32),
        frequency_penalty=full(0, torch.float32),
        seed=full(0, torch.int64),
        sample=full(0, torch.int64),
        logprobs=full(-1, torch.int32),
        bias_ids=full(0, torch.int32, biases),
        bias_values=full(0, torch.float32, biases),
        bias_until=full(0, torch.int32, biases),
        bias_count=full(0, torch.int32),
        counts=full(0, torch.int16, vocab),
        grammar=full(0, torch.int32),
        mask=full(0, torch.int32, triton.cdiv(vocab, 32)),
    )


def new_sampled_rows(rows: int, device: torch.device) -> SampledRows:
    def new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros((rows, *shape), dtype=dtype, device=device)

    return SampledRows(
        new(torch.int64), new(torch.int32), new(torch.float32), new(torch.int32, TOP), new(torch.float32, TOP)
    )


def sample_rows(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    live_rows: torch.Tensor,
    state: SamplerState,
    out: SampledRows,
    scratch: SamplerScratch,
) -> None:
    """Choose a token for each of the first `live_rows` [1] int32 rows of `logits` [rows, >= vocab].

    `logits` are bfloat16 or float32, contiguous in the last dimension, and never written to; the vocabulary is that
    of `state.counts`. `slots` [rows] int32 is a row's slot, distinct among live rows with penalties; `positions`
    [rows] int64 the new token's position. Raises ValueError for shapes that do not fit.
    """
    rows, vocab = logits.shape[0], state.counts.shape[1]
    _check(logits, slots, positions, out, scratch, vocab)
    if rows == 0:
        return
    sizes = {
        "CHUNK": scratch.chunk, "CHUNKS": scratch.chunks, "LANES": triton.next_power_of_2(scratch.chunks),
        "PDL": logits.is_cuda, "enable_fp_fusion": False,
    }  # fmt: skip
    queued = {"BLOCK": min(BLOCK, scratch.chunk), "launch_pdl": logits.is_cuda}
    programs = min(rows * scratch.chunks, PROGRAMS_PER_SM * num_sms(logits.device))
    source = (logits, logits.stride(0), slots)
    penalties = (state.repetition_penalty, state.presence_penalty, state.frequency_penalty)
    filters = (state.temperature, state.top_k, state.top_p, state.min_p)
    noise = (state.seed, state.sample)
    row_scratch = (scratch.row_values, scratch.row_numbers, scratch.queues, scratch.arrivals, vocab, scratch.rows)
    scan_kernel[(scratch.chunks, rows)](
        *source, live_rows, *filters, *penalties, state.logprobs, state.bias_count, state.grammar,
        out.tokens, out.finite, scratch.chunk_values, scratch.chunk_tokens, *row_scratch,
        num_warps=SCAN_WARPS, maxnreg=SCAN_REGISTERS, **sizes,
    )  # fmt: skip
    adjust_kernel[(programs,)](
        *source, positions, *filters, *penalties, state.logprobs,
        state.bias_ids, state.bias_values, state.bias_until, state.bias_count, state.counts, state.grammar, state.mask,
        out.tokens, out.finite, out.logprob, out.top_ids, out.top_logprobs,
        scratch.adjusted, scratch.chunk_values, scratch.chunk_tokens, scratch.top_values, scratch.top_tokens,
        *row_scratch, state.bias_ids.shape[1], state.mask.shape[1], TOP=TOP, num_warps=SCAN_WARPS, **queued, **sizes,
    )  # fmt: skip
    histogram_kernel[(programs,)](
        *source, *filters[:3], scratch.adjusted, scratch.histogram, scratch.chunk_values, *row_scratch,
        launch_pdl=logits.is_cuda, num_warps=WARPS, **sizes,
    )  # fmt: skip
    select_kernel[(programs,)](
        *source, positions, state.temperature, state.top_p, state.min_p, *penalties, *noise, state.logprobs,
        state.counts, out.tokens, out.logprob, scratch.adjusted, scratch.candidates, scratch.chunk_values,
        scratch.mass_above, *row_scratch, num_warps=WARPS, **queued, **sizes,
    )  # fmt: skip
    draw_kernel[(programs,)](
        *source, positions, state.temperature, state.min_p, *penalties, *noise, state.logprobs, state.counts,
        out.tokens, out.logprob, scratch.adjusted, scratch.candidates, scratch.chunk_values, scratch.chunk_tokens,
        *row_scratch, num_warps=WARPS, **queued, **sizes,
    )  # fmt: skip


def _check(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    out: SampledRows,
    scratch: SamplerScratch,
    vocab: int,
) -> None:
    rows = logits.shape[0]
    if logits.dim() != 2 or logits.shape[1] < vocab or logits.stride(1) != 1:
        raise ValueError(f"logits {tuple(logits.shape)}: give contiguous rows of at least {vocab}")
    if logits.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"logits are {logits.dtype}; give bfloat16 or float32")
    if slots.dtype != torch.int32 or positions.dtype != torch.int64:
        raise ValueError(f"slots are {slots.dtype} and positions {positions.dtype}; give int32 and int64")
    held = min(len(slots), len(positions), len(out.tokens), scratch.rows)
    if held < rows:
        raise ValueError(f"slots, positions, outputs and scratch hold {held} rows of {rows}")
    if not vocab <= scratch.chunks * scratch.chunk < vocab + scratch.chunk:
        raise ValueError(f"scratch of {scratch.chunks} chunks of {scratch.chunk} is not for a vocabulary of {vocab}")
