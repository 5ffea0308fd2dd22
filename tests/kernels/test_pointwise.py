"""Norm, rotary embedding, gate and KV writing against plain formulas; rows independent of their neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from splitserve.kernels.kv_write import write_kv
from splitserve.kernels.rms_norm import add_rms_norm, rms_norm
from splitserve.kernels.rope import apply_rope
from splitserve.kernels.silu_and_mul import silu_and_mul
from splitserve.models.config import Llama3Rope, RopeConfig
from splitserve.models.rope import RopeTable

CPU = torch.device("cpu")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-5 if actual.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dtypes
def test_rms_norm(dtype: torch.dtype) -> None:
    x, residual, weight = random(0, 7, 100, dtype=dtype), random(1, 7, 100, dtype=dtype), random(2, 100, dtype=dtype)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert rms_norm(x, weight, 1e-5).dtype == dtype
    close(rms_norm(x, weight, 1e-5), expected)
    summed = x + residual
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, summed)
    assert torch.equal(normed, rms_norm(summed, weight, 1e-5))


@dtypes
def test_silu_and_mul(dtype: torch.dtype) -> None:
    x = random(0, 5, 60, dtype=dtype) * 6
    gate, up = x.double().chunk(2, -1)
    assert silu_and_mul(x).dtype == dtype
    close(silu_and_mul(x), gate / (1 + (-gate).exp()) * up)
    extreme = torch.tensor([[-200.0, 200.0, 1.0, 1.0]])
    assert silu_and_mul(extreme).tolist() == [[0.0, 200.0]]


@dtypes
def test_rope_turns_pairs_by_position(dtype: torch.dtype) -> None:
    x, positions = random(0, 6, 3, 8, dtype=dtype), torch.tensor([0, 1, 2, 50, 99, 3])
    turned = apply_rope(x, *RopeTable(RopeConfig(theta=100.0), 8, 100, CPU).at(positions))
    assert turned.dtype == dtype
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    angles = positions.double()[:, None] * 100.0 ** -(torch.arange(4).double() / 4)
    expected = pairs * torch.exp(1j * angles)[:, None]
    close(turned, torch.cat((expected.real, expected.imag), -1))


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    def angle(scaling: Llama3Rope | None, pair: int) -> float:
        cos, sin = RopeTable(RopeConfig(theta=10000.0, scaling=scaling), 64, 2, CPU).at(torch.tensor([1]))
        return math.atan2(float(sin[0, 0, 32 + pair]), float(cos[0, 0, pair]))

    scaling = Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=256)
    ratios = [angle(scaling, pair) / angle(None, pair) for pair in range(32)]
    waves = [256 * 10000.0 ** (-pair / 32) / (2 * math.pi) for pair in range(32)]
    for ratio, wave in zip(ratios, waves, strict=True):
        kept = min(1.0, max(0.0, (wave - 1) / 3))
        assert ratio == pytest.approx(kept + (1 - kept) / 8, rel=1e-4)
    assert {round(ratio, 4) for ratio in ratios} >= {1.0, 0.125}
    assert len({round(ratio, 4) for ratio in ratios}) > 4


def test_write_kv_reaches_its_slots_alone() -> None:
    layer = torch.full((2, 5, 3, 16, 8), -1.0)
    k, v = random(0, 4, 3, 8), random(1, 4, 3, 8)
    write_kv(layer, (k, v), torch.tensor([3 * 16 + 5, -1, 0, 79]))
    for token, page, offset in ((0, 3, 5), (2, 0, 0), (3, 4, 15)):
        assert torch.equal(layer[:, page, :, offset], torch.stack((k[token], v[token])))
        layer[:, page, :, offset] = -1.0
    assert (layer == -1.0).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("width", [40, 64, 576])
def test_rows_do_not_depend_on_their_neighbours(threads: int, width: int) -> None:
    x, weight = random(0, 1000, 2 * width) * 3, random(1, 2 * width)
    rope = RopeTable(RopeConfig(), width, 1000, CPU)
    row_functions: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
        lambda rows, _: rms_norm(rows, weight, 1e-5),
        lambda rows, _: silu_and_mul(rows),
        lambda rows, positions: apply_rope(rows.view(-1, 2, width), *rope.at(positions)),
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for function in row_functions:
            whole = function(x, torch.arange(1000))
            for start, stop in ((0, 1), (5, 8), (17, 500), (999, 1000), (3, 777)):
                assert torch.equal(function(x[start:stop], torch.arange(start, stop)), whole[start:stop])
    finally:
        torch.set_num_threads(before)
