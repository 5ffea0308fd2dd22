"""The noise is what its formula says, and behaves like independent standard Gumbel variables."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from splitserve.engine.noise import gumbel, noise_keys

MASK = 2**64 - 1


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def reference(key: tuple[int, ...], token: int) -> float:
    """The documented formula in Python integers and float64."""
    gamma = 0x9E3779B97F4A7C15
    seed, sample, position = key
    state = mix(mix(mix((seed + gamma) & MASK) + sample * gamma & MASK) + position * gamma & MASK)
    bits = mix(state + (token + 1) * gamma & MASK) % 2**63
    uniform = min(max(float(np.float32(bits)) / 2**63, 2.0**-63), 1 - 2.0**-24)
    return -math.log(-math.log1p(-uniform))


def noise(rows: list[tuple[int, ...]], tokens: int) -> torch.Tensor:
    seeds, samples, positions = torch.tensor(rows, dtype=torch.int64).unbind(1)
    return gumbel(noise_keys(seeds, samples, positions), torch.arange(tokens))


def test_equals_the_documented_formula() -> None:
    rows: list[tuple[int, ...]] = [(0, 0, 0), (1, 0, 7), (-(2**63), 3, 5), (2**63 - 1, 63, 131_071), (-1, 0, 1)]
    expected = [[reference(row, token) for token in range(50)] for row in rows]
    torch.testing.assert_close(noise(rows, 50), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_value_does_not_depend_on_its_neighbours(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, ...]] = [tuple(row) for row in rng.integers(0, 2**31, (9, 3)).tolist()]
    together = noise(rows, 1003)
    some = torch.from_numpy(rng.permutation(1003)[:95])
    assert torch.equal(gumbel(noise_keys(*torch.tensor(rows).unbind(1)), some), together[:, some])
    for index, row in enumerate(rows):
        assert torch.equal(noise([row], 1003)[0], together[index])
        assert torch.equal(noise([row], 1)[0], together[index, :1])
        assert torch.equal(noise([row], 337)[0], together[index, :337])


def test_distribution_is_standard_gumbel() -> None:
    values = noise([(seed, 0, 0) for seed in range(40)], 25_000).double().flatten()
    count = values.numel()
    ordered = values.sort().values
    cdf = torch.exp(-torch.exp(-ordered))
    ranks = torch.arange(1, count + 1, dtype=torch.float64) / count
    kolmogorov = float((cdf - ranks).abs().max()) * math.sqrt(count)
    assert kolmogorov < 1.95, "probability of more: 0.001"
    assert values.mean() == pytest.approx(0.577216, abs=5 / math.sqrt(count) * 1.2825)
    assert values.isfinite().all()


@pytest.mark.parametrize("axis", ["seed", "sample", "position", "token"])
def test_neighbouring_keys_are_independent(axis: str) -> None:
    """Uniform values at key x and x + 1 fill the unit square evenly: chi-square over 16 x 16 cells."""
    indices = range(300)
    if axis == "token":
        values = noise([(index, 1, 2) for index in indices], 501)
        first, second = values[:, :-1], values[:, 1:]
    else:
        place = ["seed", "sample", "position"].index(axis)
        rows = [tuple(index if i == place else 11 for i in range(3)) for index in range(301)]
        values = noise(rows, 500)
        first, second = values[:-1], values[1:]
    uniform = [torch.exp(-torch.exp(-part.double())).flatten() for part in (first, second)]
    cells = (uniform[0] * 16).long() * 16 + (uniform[1] * 16).long()
    counts = torch.bincount(cells, minlength=256).double()
    expected = counts.sum() / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 255 - 5 * math.sqrt(510) < chi_square < 255 + 5 * math.sqrt(510)


def test_distinct_keys_give_distinct_noise() -> None:
    rows: list[tuple[int, ...]] = list(itertools.product(range(8), repeat=3))
    assert len({tuple(row) for row in noise(rows, 4).tolist()}) == len(rows)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_argmax_follows_softmax(temperature: float) -> None:
    """Chi-square of the sampled frequencies of 12 tokens over 40,000 positions."""
    logits = torch.linspace(-2, 2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    draws = 40_000
    values = noise([(7, 0, position) for position in range(draws)], 12)
    counts = torch.bincount((logits / temperature + values).argmax(dim=1), minlength=12).double()
    expected = draws * torch.softmax(logits.double() / temperature, dim=0)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 31.3, "11 degrees of freedom; probability of more: 0.001"
