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
from splitserve.engine.noise import _GAMMA, _mix_, gumbel, noise_keys
from splitserve.engine.sampler import SamplerRow, _adjust_, sample
from splitserve.kernels import gumbel as kernel_noise
from splitserve.kernels import sampling_draw
from splitserve.kernels.launch import INTERPRETING
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
    assert not scratch.queues[:, 0].any()
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


def plain(**params: float) -> Request:
    return Request(SamplingParams(**params), [1, 2], [], frozenset())  # type: ignore[arg-type]


def tokens_of(logits: torch.Tensor, requests: list[Request]) -> list[int]:
    state = state_of(requests, logits.shape[1], str(logits.device))
    return run(logits, list(range(len(requests))), positions_of(requests), state).tokens.tolist()


@triton.jit  # type: ignore[untyped-decorator]
def _noise(seed, sample, position, bits, noise, rough, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, token = tl.program_id(0), tl.arange(0, BLOCK)
    key = kernel_noise.noise_key(tl.load(seed + row), tl.load(sample + row), tl.load(position + row))
    tl.store(bits + row * BLOCK + token, kernel_noise.noise_bits(key, token))
    tl.store(noise + row * BLOCK + token, kernel_noise.gumbel(key, token))
    tl.store(rough + row * BLOCK + token, kernel_noise.rough_gumbel(key, token))


@devices
def test_noise_is_the_engines(device: str) -> None:
    keys = [(0, 0, 0), (1, 0, 7), (-(2**63), 3, 5), (2**63 - 1, 63, 131_071), (-1, 0, 1)]
    seeds, samples, positions = torch.tensor(keys, device=device).unbind(1)
    bits = torch.empty(len(keys), 1024, dtype=torch.int64, device=device)
    noise, rough = torch.empty(2, len(keys), 1024, device=device)
    columns = [column.contiguous() for column in (seeds, samples, positions)]
    _noise[(len(keys),)](*columns, bits, noise, rough, BLOCK=1024)
    hashed = noise_keys(seeds, samples, positions)[:, None] + (torch.arange(1024, device=device) + 1) * _GAMMA
    assert torch.equal(bits, _mix_(hashed) & (2**63 - 1))
    expected = gumbel(noise_keys(seeds, samples, positions), torch.arange(1024, device=device))
    torch.testing.assert_close(noise, expected, atol=5e-7, rtol=5e-7)
    torch.testing.assert_close(rough, noise, atol=1e-4, rtol=0)


@pytest.mark.skipif(not INTERPRETING, reason="compiled kernels have the margin in them")
def test_rough_sums_choose_what_exact_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [plain(temperature=temperature, seed=seed) for seed, temperature in enumerate((0.5, 1.0, 3.0, 100.0))]
    logits = random_logits(4, 300, 9)
    rough = tokens_of(logits, requests)
    monkeypatch.setattr(sampling_draw, "ROUGH_MARGIN", tl.constexpr(1e9))
    assert tokens_of(logits, requests) == rough


@pytest.mark.parametrize(
    ("vocab", "dtype", "seed"), [(300, torch.float32, 0), (300, torch.bfloat16, 1), (1000, torch.float32, 2)], ids=str
)
def test_any_parameters(vocab: int, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    requests = [random_request(rng, vocab) for _ in range(40 if vocab < 500 else 15)]
    assert check(random_logits(len(requests), vocab, seed, dtype), requests, "cpu") == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("vocab", "rows"), [(300, 400), (102_400, 60), (129_280, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_parameters_of_real_vocabularies(vocab: int, rows: int, dtype: torch.dtype) -> None:
    rng = random.Random(vocab + dtype.itemsize)
    requests = [random_request(rng, vocab) for _ in range(rows)]
    assert check(random_logits(rows, vocab, 1, dtype), requests, "cuda") <= rows // 50


@pytest.mark.gpu
def test_wide_nuclei() -> None:
    """Thresholds that lie among tens of thousands of candidates, or deep in the tail."""
    cases: list[dict[str, float]] = [
        {"top_p": 0.9, "temperature": 100.0}, {"top_p": 0.999}, {"top_k": 60_000, "top_p": 0.9},
        {"top_k": 100_000}, {"top_p": 0.5, "temperature": 3.0}, {"top_p": 0.99, "min_p": 1e-3, "temperature": 2.0},
    ]  # fmt: skip
    requests = [plain(**{"temperature": 1.0, "seed": seed, **case}) for case in cases for seed in range(6)]
    check_rows = random_logits(len(requests), 102_400, 5)
    check_rows[::2] *= 0.01
    check_rows[::3] = check_rows[::3].round()
    assert check(check_rows, requests, "cuda") <= 2


@devices
def test_ties_and_bounds_of_filters(device: str) -> None:
    """Ties at a threshold are all kept: which of them come depends on the noise alone."""
    logits = torch.full((40, 300), -5.0)
    logits[:, [7, 131, 260, 299]] = 2.0
    logits[:, [3, 200]] = 1.0
    assert tokens_of(logits[:3].to(device), [plain()] * 3) == [7] * 3
    for params in ({"top_k": 2}, {"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 1, "top_p": 0.1, "min_p": 0.9}):
        requests = [plain(temperature=1.0, seed=seed, **params) for seed in range(14)]
        drawn = tokens_of(logits[:14].to(device), requests)
        assert set(drawn) == {7, 131, 260, 299}, params
    drawn = tokens_of(logits.to(device), [plain(temperature=1.0, seed=seed, top_k=5) for seed in range(40)])
    assert set(drawn) == {7, 131, 260, 299, 3, 200}


@devices
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_a_finite_best_fail_alone(device: str, bad: float) -> None:
    logits = random_logits(6, 300, 3)
    logits[1:5:3, 290 if bad != -torch.inf else slice(None)] = bad
    requests = [plain(temperature=temperature, top_p=0.9, logprobs=2, seed=5) for temperature in [0.0] * 3 + [1.0] * 3]
    check(logits, requests, device)
    out = run(logits.to(device), list(range(6)), positions_of(requests), state_of(requests, 300, device))
    assert out.finite.tolist() == [1, 0, 1, 1, 0, 1]


@devices
def test_barred_logits(device: str) -> None:
    """Few tokens are left of a row, and fewer than top-k or the log probabilities ask for."""
    logits = torch.full((4, 300), -torch.inf)
    logits[:, [5, 150, 299]] = torch.tensor([1.0, 2.0, 0.5])
    params: list[dict[str, float]] = [{}, {"temperature": 1.0, "top_k": 9}, {"temperature": 9.0, "top_p": 0.99}]
    requests = [plain(seed=3, **case) for case in params]
    check(logits[:3], requests, device)
    state = state_of([plain(logprobs=3)], 300, device)
    out = run(logits[:1].to(device), [0], [2], state)
    assert out.top_ids[0, :3].tolist() == [150, 5, 299]


@devices
def test_a_row_alone_has_the_bits_it_has_among_others(device: str) -> None:
    vocab, rows = (300, 12) if device == "cpu" else (102_400, 256)
    rng = random.Random(4)
    requests = [random_request(rng, vocab) for _ in range(rows)]
    logits, positions = random_logits(rows, vocab, 4, torch.bfloat16).to(device), positions_of(requests)

    def sampled(order: list[int], live: int | None = None) -> SampledRows:
        return run(logits[order], order, [positions[row] for row in order], state_of(requests, vocab, device), live)

    together = sampled(list(range(rows)))
    order = rng.sample(range(rows), rows)
    for some in (order, order[: rows // 3], *([row] for row in order[:4])):
        apart = sampled(some)
        for field in fields(SampledRows):
            assert torch.equal(getattr(apart, field.name), getattr(together, field.name)[some]), field.name


@devices
def test_idle_rows_are_left_alone(device: str) -> None:
    requests = [plain(repetition_penalty=1.5, logprobs=2, temperature=temperature) for temperature in (0.0, 1.0) * 3]
    logits, state = random_logits(6, 300, 2).to(device), state_of(requests, 300, device)
    before = logits.clone()
    out = run(logits, list(range(6)), [2] * 6, state, live=3)
    assert torch.equal(logits, before)
    for field in fields(SampledRows):
        assert not getattr(out, field.name)[3:].any()
    assert (state.counts & 0x7FFF).sum(1).tolist() == [1, 1, 1, 0, 0, 0]


@devices
def test_padded_and_strided_logits(device: str) -> None:
    requests = [plain(temperature=temperature, logprobs=1) for temperature in (0.0, 1.0, 2.0)]
    logits = random_logits(3, 300, 6)
    wide = torch.full((3, 333), 50.0)
    wide[:, :300] = logits
    state = state_of(requests, 300, device)
    padded = run(wide.to(device)[:, :320], [0, 1, 2], [2] * 3, state)
    assert torch.equal(padded.tokens, run(logits.to(device), [0, 1, 2], [2] * 3, state).tokens)


@devices
def test_counts_saturate(device: str) -> None:
    state = state_of([plain(presence_penalty=-1.0)] * 2, 300, device)
    logits = torch.zeros(2, 300, device=device)
    logits[:, 9] = 1.0
    state.counts[0, 9], state.counts[1, 9] = 0x7FFF, -1
    run(logits, [0, 1], [2, 2], state)
    assert state.counts[:, 9].tolist() == [0x7FFF, -1]


@devices
def test_bars_end_at_their_position(device: str) -> None:
    request = Request(SamplingParams(min_tokens=3, logit_bias={4: 9.0}), [1], [], frozenset({4}))
    state = state_of([request], 300, device)
    logits = random_logits(1, 300, 0).to(device)
    assert run(logits, [0], [4], state).tokens.tolist() == [4]
    assert run(logits, [0], [3], state).tokens.tolist() != [4]


@devices
@pytest.mark.parametrize("params", [{}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.15}], ids=str)
def test_frequencies_follow_the_filtered_softmax(device: str, params: dict[str, float]) -> None:
    """Chi-square over 12 tokens."""
    draws = 120 if device == "cpu" else 20_000
    row = torch.linspace(-2, 2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    request = plain(temperature=1.5, seed=11, **params)
    drawn = run(
        row.expand(draws, -1).contiguous().to(device), [0] * draws, list(range(draws)), state_of([request], 12, device)
    )
    scores = (row / 1.5).double()
    kept = scores >= scores.sort().values[-int(params.get("top_k", 12))]
    probabilities = scores.softmax(0)
    above = torch.tensor([float(probabilities[scores > score].sum()) for score in scores])
    kept &= above < params.get("top_p", 1.0)
    kept &= scores - scores.max() >= np.log(params.get("min_p", 1e-30))
    expected = scores.masked_fill(~kept, -torch.inf).softmax(0) * draws
    counts = torch.bincount(drawn.tokens.cpu(), minlength=12).double()
    assert not counts[~kept].any()
    degrees = int(kept.sum()) - 1
    chi_square = float((((counts - expected) ** 2) / expected)[kept].sum())
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5 + 4


def test_shapes_that_do_not_fit_are_refused() -> None:
    state, out = new_sampler_state(2, 300, torch.device("cpu")), new_sampled_rows(2, torch.device("cpu"))
    logits, scratch = torch.zeros(2, 300), new_sampler_scratch(2, 300, torch.device("cpu"), 128)
    slots, positions, live = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), torch.ones(1)
    for broken, message in (
        ((logits[:, :299], slots, positions), "at least 300"),
        ((logits.half(), slots, positions), "float16"),
        ((logits, slots.long(), positions), "int32"),
        ((torch.zeros(3, 300), slots, positions), "hold 2 rows of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_rows(*broken, live, state, out, scratch)
    with pytest.raises(ValueError, match="not for a vocabulary of 300"):
        sample_rows(logits, slots, positions, live, state, out, new_sampler_scratch(2, 500, torch.device("cpu"), 128))


@pytest.mark.gpu
def test_one_graph_serves_any_requests() -> None:
    vocab, rows = 102_400, 20
    rng, device = random.Random(8), torch.device("cuda")
    logits = random_logits(rows, vocab, 8, torch.bfloat16).to(device)
    state, out = new_sampler_state(rows, vocab, device, biases=40), new_sampled_rows(rows, device)
    scratch = new_sampler_scratch(rows, vocab, device)
    slots, live = torch.arange(rows, dtype=torch.int32, device=device), torch.tensor([rows], device=device).int()
    positions = torch.zeros(rows, dtype=torch.int64, device=device)
    sample_rows(logits, slots, positions, live, state, out, scratch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_rows(logits, slots, positions, live, state, out, scratch)
    for _ in range(3):
        requests = [random_request(rng, vocab) for _ in range(rows)]
        wanted = state_of(requests, vocab, "cuda")
        for field in fields(SamplerState):
            getattr(state, field.name).copy_(getattr(wanted, field.name))
        positions.copy_(torch.tensor(positions_of(requests)))
        graph.replay()
        expected = run(logits, list(range(rows)), positions_of(requests), wanted)
        assert torch.equal(out.tokens, expected.tokens)
        assert torch.equal(state.counts, wanted.counts)
