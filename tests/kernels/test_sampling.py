"""The sampler's kernels against `engine.sampler`, and to the bit against themselves in other company.

A GPU's exponentials and logarithms differ from torch's in the last bits, so a token at the very threshold of top-p or
two sums that are equal but for rounding may go the other way. Such rows are counted, and must be explained by a margin
of float32 rounding.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from splitserve.cluster.sampling import SamplingParams
from splitserve.engine.noise import gumbel, noise_keys
from splitserve.engine.sampler import SamplerRow, sample
from splitserve.kernels import gumbel as kernel_noise
from splitserve.kernels.sampling import (
    BARRED_FOREVER,
    SampledRows,
    SamplerState,
    new_sampled_rows,
    new_sampler_state,
    sample_rows,
)
from splitserve.kernels.sampling_scratch import CHUNK, new_sampler_scratch

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
SMALL = [300, 1000]
REAL = [102_400, 129_280]


@dataclass(frozen=True)
class Request:
    """One row: `allowed` are the tokens of a grammar, None for no grammar."""

    params: SamplingParams
    prompt: list[int]
    output: list[int]
    stopping: frozenset[int]
    sample: int = 0
    allowed: list[int] | None = None

    def reference(self, vocab: int) -> SamplerRow:
        """A grammar bars at the same place as min_tokens, so it is put to the reference as such."""
        params, stopping = self.params, self.stopping if self.barring else frozenset()
        if self.allowed is not None:
            stopping = stopping | (frozenset(range(vocab)) - frozenset(self.allowed))
        if stopping:
            params = replace(params, min_tokens=len(self.output) + 1)
        return SamplerRow(params, self.sample, self.prompt + self.output, len(self.prompt), stopping)

    @property
    def barring(self) -> bool:
        return len(self.output) < self.params.min_tokens

    @property
    def biases(self) -> list[tuple[int, float, int]]:
        """(token, value, until)"""
        bars = [(token, -torch.inf, len(self.prompt) + self.params.min_tokens) for token in sorted(self.stopping)]
        return [*((token, bias, BARRED_FOREVER) for token, bias in self.params.logit_bias.items()), *bars]


def single(value: float) -> float:
    return float(np.float32(value))


def random_request(rng: random.Random, vocab: int) -> Request:
    """Any combination of parameters; half of the rows sample, most of them with filters."""
    few = rng.sample(range(vocab), 8)

    def rarely(value: float, otherwise: float, chance: float = 0.3) -> float:
        return single(value) if rng.random() < chance else otherwise

    params = SamplingParams(
        temperature=rarely(rng.choice([0.3, 0.7, 1.0, 1.0, 1.6, 5.0, 100.0, 1e-3, 1e-12, 1e-38]), 0.0, 0.8),
        top_k=rng.choice([0, 0, 0, 1, 2, 7, 40, 200, vocab - 1, vocab, vocab + 7]),
        top_p=rarely(rng.choice([1e-9, 0.1, 0.5, 0.8, 0.95, 0.999]), 1.0, 0.5),
        min_p=rarely(rng.choice([1.0, 0.5, 0.05, 0.001, 1e-9]), 0.0),
        repetition_penalty=rarely(rng.choice([1.3, 0.6, 2.0]), 1.0),
        presence_penalty=rarely(rng.choice([1.5, -0.7]), 0.0),
        frequency_penalty=rarely(rng.choice([0.9, -0.4]), 0.0),
        logit_bias={token: single(rng.uniform(-9, 9)) for token in few[:5]} if rng.random() < 0.3 else {},
        min_tokens=rng.choice([0, 0, 9]),
        seed=rng.randrange(-(2**63), 2**63),
        logprobs=rng.choice([None, None, 0, 1, 5, 20]),
    )
    prompt = [rng.randrange(vocab) for _ in range(rng.randrange(1, 30))]
    output = [rng.choice(few) for _ in range(rng.randrange(0, 20))]
    allowed = sorted(rng.sample(range(vocab), vocab // 3)) if rng.random() < 0.2 else None
    return Request(params, prompt, output, frozenset(few[3:6]), rng.randrange(64), allowed)


def state_of(requests: list[Request], vocab: int, device: str) -> SamplerState:
    """Slot i asks for what request i does."""
    state = new_sampler_state(len(requests), vocab, torch.device("cpu"), biases=40)
    for slot, request in enumerate(requests):
        params = request.params
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            getattr(state, name)[slot] = getattr(params, name)
        state.top_k[slot], state.seed[slot], state.sample[slot] = params.top_k, params.seed, request.sample
        state.logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        state.bias_count[slot] = len(request.biases)
        for index, (token, value, until) in enumerate(request.biases):
            state.bias_ids[slot, index], state.bias_values[slot, index] = token, value
            state.bias_until[slot, index] = until
        for token in request.output:
            state.counts[slot, token] += 1
        for token in set(request.prompt):
            state.counts[slot, token] |= -(2**15)
        if request.allowed is not None:
            bits = np.zeros(triton.cdiv(vocab, 32) * 32, dtype=np.uint8)
            bits[request.allowed] = 1
            state.grammar[slot] = 1
            state.mask[slot] = torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32).copy())
    return SamplerState(**{field.name: getattr(state, field.name).to(device) for field in fields(state)})


def run(
    logits: torch.Tensor, slots: list[int], positions: list[int], state: SamplerState, live: int | None = None
) -> SampledRows:
    """On the logits' device; small vocabularies in chunks of 128."""
    device, vocab, rows = logits.device, state.counts.shape[1], len(slots)
    scratch = new_sampler_scratch(rows + 1, vocab, device, 128 if vocab <= 1000 else CHUNK)
    for name in ("adjusted", "chunk_values", "top_values", "row_values"):
        getattr(scratch, name).fill_(torch.nan)
    out = new_sampled_rows(rows, device)
    sample_rows(
        logits,
        torch.tensor(slots, dtype=torch.int32, device=device),
        torch.tensor(positions, dtype=torch.int64, device=device),
        torch.tensor([rows if live is None else live], dtype=torch.int32, device=device),
        state,
        out,
        scratch,
    )
    assert not scratch.arrivals.any()
    return out


def positions_of(requests: list[Request]) -> list[int]:
    return [len(request.prompt) + len(request.output) for request in requests]


def random_logits(rows: int, vocab: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    logits = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    return logits.to(dtype)


def margin(logits: torch.Tensor, request: Request, token: int, expected: int) -> float:
    """How far from rounding the choice of `token` for `expected` is, 0 for as near as float64 can tell.

    The larger of what `token` lacks in the sum with noise and what it lacks, or `expected` has to spare, at the
    threshold of top-p.
    """
    vocab, params = logits.shape[0], request.params
    row = request.reference(vocab)
    adjusted = logits.double().clone()
    from splitserve.engine.sampler import _adjust_

    _adjust_(adjusted, row)
    scores = (adjusted - adjusted.max()) / max(params.temperature, torch.finfo(torch.float32).tiny)
    keys = noise_keys(*(torch.tensor([value]) for value in (params.seed, request.sample, row.position)))
    sums = scores + gumbel(keys, torch.arange(vocab))[0].double()
    survivors = scores
    if 0 < params.top_k < vocab:
        survivors = scores[scores >= scores.topk(params.top_k).values[-1]]
    mass = survivors.softmax(0)

    def spare(chosen: int) -> float:
        """Mass that may yet be added before `chosen` is outside the nucleus; negative outside of it."""
        above = mass[survivors > scores[chosen]].sum()
        return float(params.top_p - above)

    lacking = float(sums[expected] - sums[token])
    if lacking > 0:  # then it was left out
        return min(lacking, abs(spare(expected)))
    return min(-lacking, abs(spare(token)))


def check(logits: torch.Tensor, requests: list[Request], device: str) -> int:
    """Compare all rows with the reference; returns how many tokens differ by float32 rounding."""
    vocab = logits.shape[1]
    state = state_of(requests, vocab, device)
    before = state.counts.clone()
    out = run(logits.to(device), list(range(len(requests))), positions_of(requests), state)
    tokens, finite, logprob = out.tokens.tolist(), out.finite.tolist(), out.logprob.tolist()
    expected = sample(logits.float(), [request.reference(vocab) for request in requests])
    differing = 0
    for row, (request, wanted) in enumerate(zip(requests, expected, strict=True)):
        assert finite[row] == (wanted is not None), request
        if wanted is None:
            continue
        if tokens[row] != wanted.token_id:
            differing += 1
            found = margin(logits[row].float(), request, tokens[row], wanted.token_id)
            assert found < 1e-5, (tokens[row], wanted.token_id, found, request)
        if request.params.logprobs is not None:
            own = torch.log_softmax(logits[row].double(), dim=0)
            assert logprob[row] == pytest.approx(own[tokens[row]].item(), abs=2e-5, rel=1e-5)
            top = request.params.logprobs
            order = sorted(range(vocab), key=lambda token: (-own[token].item(), token))[:top] if vocab <= 1000 else []
            values = torch.sort(own, descending=True).values[:top]
            if order:
                assert out.top_ids[row, :top].tolist() == order
            torch.testing.assert_close(out.top_logprobs[row, :top].cpu().double(), values, atol=2e-5, rtol=1e-5)
            assert own[out.top_ids[row, :top].long().cpu()].tolist() == values.tolist()
        penalised = request.reference(vocab).params
        if penalised.repetition_penalty != 1 or penalised.presence_penalty or penalised.frequency_penalty:
            before[row, tokens[row]] += 1
    assert torch.equal(state.counts, before)
    return differing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", SMALL)
@pytest.mark.parametrize("seed", range(2))
def test_any_parameters(vocab: int, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    requests = [random_request(rng, vocab) for _ in range(50)]
    assert check(random_logits(50, vocab, seed, dtype), requests, "cpu") <= 1
