"""Filters, penalties and log probabilities against plain numpy; a row's result never depends on its neighbours."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from splitserve.cluster.sampling import SamplingParams
from splitserve.engine.noise import gumbel, noise_keys
from splitserve.engine.sampler import SampledToken, SamplerRow, prompt_logprobs, sample

VOCAB = 500
SEEDS = range(30)
EOS = frozenset({3})
Floats = npt.NDArray[np.float64]


def row(params: SamplingParams, prompt: list[int] | None = None, output: list[int] | None = None) -> SamplerRow:
    prompt, output = prompt or [1, 2], output or []
    return SamplerRow(params, 0, prompt + output, len(prompt), EOS | frozenset(params.stop_token_ids))


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def chosen(results: list[SampledToken | None]) -> list[int]:
    return [result.token_id for result in results if result is not None]


def reference_adjust(logits: Floats, request: SamplerRow) -> Floats:
    params, logits = request.params, logits.copy()
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in set(request.token_ids):
        logits[token] *= 1 / params.repetition_penalty if logits[token] > 0 else params.repetition_penalty
    output = list(request.token_ids[request.prompt_tokens :])
    for token in set(output):
        logits[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    if len(output) < params.min_tokens:
        logits[list(request.stopping_ids)] = -np.inf
    return logits


def softmax(values: Floats) -> Floats:
    powers = np.exp(values - values.max())
    probabilities: Floats = powers / powers.sum()
    return probabilities


def reference_kept(logits: Floats, params: SamplingParams) -> set[int]:
    """Tokens that survive top-k, then top-p of the rest renormalised, then min-p."""
    scores = logits / params.temperature
    kept = [int(token) for token in np.argsort(-scores, kind="stable")]
    if params.top_k:
        kept = kept[: params.top_k]
    mass = np.cumsum(softmax(scores[kept]))
    kept = kept[: int((mass < params.top_p).sum()) + 1]
    ratios = np.exp(scores[kept] - scores[kept].max())
    return {token for token, ratio in zip(kept, ratios, strict=True) if ratio >= params.min_p}


def reference_token(logits: Floats, request: SamplerRow) -> int:
    adjusted = reference_adjust(logits, request)
    if request.params.temperature == 0:
        return int(adjusted.argmax())
    seeds, samples, positions = torch.tensor([[request.params.seed, request.sample, request.position]]).unbind(1)
    noise = gumbel(noise_keys(seeds, samples, positions), torch.arange(len(logits)))[0].double().numpy()
    scores = adjusted / request.params.temperature + noise
    kept = sorted(reference_kept(adjusted, request.params))
    return kept[int(scores[kept].argmax())]


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.3, "top_k": 5},
    {"temperature": 2.5, "top_k": 1},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.7, "min_p": 0.05},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 4.0, "top_k": VOCAB + 1, "top_p": 0.999},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6, "temperature": 0.7},
    {"presence_penalty": 1.5, "frequency_penalty": -0.7},
    {"temperature": 1.0, "presence_penalty": -2.0, "frequency_penalty": 2.0, "top_p": 0.95},
    {"logit_bias": {7: 9.0, 8: -50.0}},
    {"temperature": 1.0, "logit_bias": {3: 12.0}, "min_tokens": 50, "stop_token_ids": (5, 6)},
    {"logit_bias": {3: 90.0}, "min_tokens": 50},
    {"logit_bias": {3: 90.0}, "min_tokens": 1},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_equal_the_numpy_reference(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    for seed in SEEDS:
        request = row(
            SamplingParams(seed=seed, **case), rng.integers(0, VOCAB, 9).tolist(), rng.integers(0, 12, 7).tolist()
        )
        logits = random_logits(seed)
        assert chosen(sample(logits, [request])) == [reference_token(logits[0].double().numpy(), request)]


@pytest.mark.parametrize("case", CASES[2:9], ids=str)
def test_filters_keep_exactly_the_reference_set(case: dict[str, Any]) -> None:
    """Over many seeds only kept tokens are drawn, and every likely one of them is."""
    logits = random_logits(3, vocab=16)
    params = SamplingParams(**case)
    kept = reference_kept(logits[0].double().numpy(), params)
    requests = [row(replace(params, seed=seed)) for seed in range(600)]
    drawn = set(chosen(sample(logits.expand(600, -1), requests)))
    assert drawn <= kept
    likely = softmax(logits[0].double().numpy() / params.temperature)
    assert drawn >= {token for token in kept if likely[token] > 0.02}


@pytest.mark.parametrize("vocab", [5000, 501])
def test_nucleus_beyond_the_first_guess(vocab: int) -> None:
    """A nearly flat distribution: the nucleus is larger than the partial sort that usually suffices."""
    logits = 0.01 * random_logits(1, vocab=vocab)
    params = SamplingParams(temperature=1.0, top_p=0.9)
    kept = reference_kept(logits[0].double().numpy(), params)
    assert len(kept) > 0.8 * vocab
    drawn = chosen(sample(logits.expand(400, -1), [row(replace(params, seed=seed)) for seed in range(400)]))
    outside = [token for token in set(drawn) if token not in kept]
    assert len(outside) <= 1, "float32 sums may move the threshold by one token"


def test_rows_do_not_depend_on_their_neighbours() -> None:
    rng = np.random.default_rng(1)
    requests, vocab = [], 4099
    for index in range(40):
        params = SamplingParams(seed=index, logprobs=index % 4 or None, **CASES[index % len(CASES)])
        requests.append(row(params, rng.integers(0, vocab, 20).tolist(), rng.integers(0, vocab, index).tolist()))
    logits = random_logits(5, rows=40, vocab=vocab)
    together = sample(logits, requests)
    assert [sample(logits[i : i + 1], [requests[i]])[0] for i in range(40)] == together
    order = rng.permutation(40)[:23]
    assert sample(logits[order], [requests[i] for i in order]) == [together[i] for i in order]


def test_logits_are_not_changed() -> None:
    logits = random_logits(0, rows=len(CASES))
    before = logits.clone()
    sample(logits, [row(SamplingParams(logprobs=2, **case), output=[1, 1, 4]) for case in CASES])
    assert torch.equal(logits, before)


def test_one_row_of_logits_serves_several_requests() -> None:
    logits = random_logits(8)
    best = int(logits.argmax())
    biases: list[dict[int, float]] = [{}, {best: -50.0}, {best: 5.0}]
    requests = [row(SamplingParams(logit_bias=bias, logprobs=3)) for bias in biases]
    assert sample(logits.expand(3, -1), requests) == [sample(logits, [request])[0] for request in requests]


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, [400, 90, 91]] = 2.0
    assert chosen(sample(logits, [row(SamplingParams())] * 3)) == [90, 90, 90]


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-40, 1e-300])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = 30 * random_logits(2, rows=8)
    rows = [row(SamplingParams(temperature=temperature, top_p=0.9, seed=seed)) for seed in range(8)]
    assert chosen(sample(logits, rows)) == logits.argmax(dim=1).tolist()


def test_samples_and_positions_draw_differently() -> None:
    params = SamplingParams(temperature=1.0, n=4)
    flat = torch.zeros(16, VOCAB)
    rows = [SamplerRow(params, index, [1] * (2 + position), 2, EOS) for index in range(4) for position in range(4)]
    drawn = chosen(sample(flat, rows))
    assert len(set(drawn)) >= 14
    assert chosen(sample(flat, rows)) == drawn


def test_logprobs_are_the_models_own() -> None:
    logits = random_logits(4, rows=3)
    rows = [
        row(SamplingParams(logprobs=5, temperature=0.7, top_k=2, logit_bias={9: 100.0})),
        row(SamplingParams()),
        row(SamplingParams(logprobs=0)),
    ]
    biased, plain, chosen_only = sample(logits, rows)
    assert biased is not None
    assert plain is not None
    assert chosen_only is not None
    expected = torch.log_softmax(logits, dim=-1)
    assert biased.token_id == 9
    assert biased.logprobs is not None
    assert biased.logprobs.logprob == expected[0, 9].item()
    values, ids = expected[0].sort(descending=True)
    assert biased.logprobs.top == tuple(zip(ids[:5].tolist(), values[:5].tolist(), strict=True))
    assert plain.logprobs is None
    assert chosen_only.logprobs is not None
    assert chosen_only.logprobs.logprob == expected[2].max().item()
    assert chosen_only.logprobs.top == ()


@pytest.mark.parametrize("top", [0, 1, 7])
def test_prompt_logprobs(top: int) -> None:
    logits = random_logits(6, rows=20)
    targets = np.random.default_rng(2).integers(0, VOCAB, 20).tolist()
    expected = torch.log_softmax(logits.double(), dim=-1)
    found = prompt_logprobs(logits, targets, top)
    assert len(found) == 20
    for index, entry in enumerate(found):
        assert entry.logprob == pytest.approx(expected[index, targets[index]].item(), abs=1e-5)
        assert [token for token, _ in entry.top] == expected[index].argsort(descending=True)[:top].tolist()
        assert [value for _, value in entry.top] == sorted((value for _, value in entry.top), reverse=True)
    assert prompt_logprobs(logits[:7], targets[:7], top) + prompt_logprobs(logits[7:], targets[7:], top) == found
    assert prompt_logprobs(logits[:0], [], top) == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_without_finite_logits_fails_alone(bad: float) -> None:
    logits = random_logits(7, rows=3)
    logits[1] = bad
    for temperature in (0.0, 1.0):
        rows = [row(SamplingParams(temperature=temperature, top_p=0.9, seed=5, logprobs=1))] * 3
        first, failed, last = sample(logits, rows)
        assert failed is None
        assert [first, last] == sample(logits[[0, 2]], rows[:2])


def test_rows_and_requests_must_match() -> None:
    with pytest.raises(ValueError, match="found 2 rows; there are 1 requests"):
        sample(random_logits(0, rows=2), [row(SamplingParams())])
