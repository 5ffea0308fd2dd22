"""The Triton kernels for norm, rotary embedding, gate and KV writing against their torch references.

Under Triton's interpreter on a CPU, and on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from splitserve.kernels.kv_write import triton_write_kv, write_kv
from splitserve.kernels.latent_queries import latent_queries, latent_queries_reference
from splitserve.kernels.latent_write import triton_write_latent, write_latent
from splitserve.kernels.rms_norm import Terms, add_rms_norm, rms_norm, triton_rms_norm
from splitserve.kernels.rope import apply_rope, apply_rope_interleaved, triton_rope
from splitserve.kernels.silu_and_mul import silu_and_mul, triton_silu_and_mul
from splitserve.models.config import RopeConfig
from splitserve.models.rope import RopeTable

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within two roundings of the dtype."""
    assert actual.dtype == expected.dtype
    tolerance = 2e-6 if expected.dtype == torch.float32 else 2**-6
    torch.testing.assert_close(actual.cpu().double(), expected.double(), atol=tolerance, rtol=tolerance)


@devices
@dtypes
@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (7, 100), (3, 2048)])
def test_rms_norm(device: str, dtype: torch.dtype, rows: int, dim: int) -> None:
    wide, residual = random(rows, dim + 24, dtype=dtype), random(rows, dim, dtype=dtype, seed=1)
    weight = random(dim, dtype=dtype, seed=2)
    x = wide[:, 8 : 8 + dim]  # part of a fused projection
    close(triton_rms_norm(wide.to(device)[:, 8 : 8 + dim], None, weight.to(device), 1e-5), rms_norm(x, weight, 1e-5))
    on_device = residual.to(device, copy=True)
    normed = triton_rms_norm(x.to(device), on_device, weight.to(device), 1e-5)
    expected, total = add_rms_norm(x.clone(), residual, weight, 1e-5)
    close(on_device, total)  # the interpreter cuts float32 down to bfloat16 where a GPU rounds
    close(normed, expected)


@devices
@dtypes
@pytest.mark.parametrize(("rows", "dim"), [(1, 24), (5, 1408)])
def test_silu_and_mul(device: str, dtype: torch.dtype, rows: int, dim: int) -> None:
    x = random(rows, 2 * dim, dtype=dtype) * 6
    close(triton_silu_and_mul(x.to(device)), silu_and_mul(x))


@devices
@dtypes
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (3, 64), (16, 8)])
def test_rope(device: str, dtype: torch.dtype, interleaved: bool, heads: int, dim: int) -> None:
    wide = random(9, heads, dim + 16, dtype=dtype)
    table = RopeTable(RopeConfig(theta=100.0), dim, 100, torch.device("cpu"))
    cos, sin = table.at(torch.tensor([0, 1, 2, 50, 99, 3, 3, 7, 64]))
    reference = apply_rope_interleaved if interleaved else apply_rope
    x = wide.to(device)[..., 16:]
    close(triton_rope(x, cos.to(device), sin.to(device), interleaved=interleaved), reference(wide[..., 16:], cos, sin))


@devices
@dtypes
@pytest.mark.parametrize(("planes", "heads", "dim"), [(2, 3, 64), (1, 1, 72)])
def test_write_kv(device: str, dtype: torch.dtype, planes: int, heads: int, dim: int) -> None:
    cache = random(planes, 6, heads, 16, dim, dtype=dtype)
    wide = random(5, planes * heads, dim, dtype=dtype, seed=1)
    slots = torch.tensor([3 * 16 + 5, -1, 0, 95, 17])
    written = cache.to(device, copy=True)
    triton_write_kv(written, torch.split(wide.to(device), heads, dim=1), slots.to(device))
    write_kv(cache, torch.split(wide, heads, dim=1), slots)
    assert torch.equal(written.cpu(), cache)


@devices
@dtypes
def test_write_latent(device: str, dtype: torch.dtype) -> None:
    cache, wide = random(1, 6, 1, 16, 56, dtype=dtype), random(5, 70, dtype=dtype, seed=1)
    norm, slots = random(40, dtype=dtype, seed=2), torch.tensor([3 * 16 + 5, -1, 0, 95, 17])
    cos, sin = RopeTable(RopeConfig(theta=100.0), 16, 100, torch.device("cpu")).at(torch.tensor([0, 1, 2, 50, 99]))
    written = cache.to(device, copy=True)
    angles = (cos.to(device), sin.to(device))
    triton_write_latent(wide.to(device)[:, 14:], norm.to(device), 1e-5, *angles, written, slots.to(device))
    write_latent(wide[:, 14:], norm, 1e-5, cos, sin, cache, slots)
    close(written, cache)


@devices
@dtypes
@pytest.mark.parametrize("terms", [1, 3])
def test_latent_queries(device: str, dtype: torch.dtype, terms: int) -> None:
    cache, wide = random(1, 6, 1, 16, 56, dtype=dtype), random(terms, 5, 3 * 48 + 56, dtype=torch.float32, seed=1)
    norm, slots = random(40, dtype=dtype, seed=2), torch.tensor([3 * 16 + 5, -1, 0, 95, 17])
    absorb = random(3, 40, 32, dtype=dtype, seed=3) / 8
    angles = RopeTable(RopeConfig(theta=100.0), 16, 100, torch.device("cpu")).at(torch.tensor([0, 1, 2, 50, 99]))
    written = cache.to(device, copy=True)
    q, latent = torch.split(wide.to(device), [3 * 48, 56], dim=-1)
    on_device = (each.to(device) for each in (*angles, slots))
    cos, sin, on_slots = on_device
    queries = latent_queries(q, latent, absorb.to(device), norm.to(device), 1e-5, cos, sin, written, on_slots)
    q, latent = torch.split(wide, [3 * 48, 56], dim=-1)
    close(queries, latent_queries_reference(q, latent, absorb, norm, 1e-5, *angles, cache, slots))
    close(written, cache)


@devices
@dtypes
@pytest.mark.parametrize("weighted", [False, True])
def test_terms_are_added_in_the_norm(device: str, dtype: torch.dtype, weighted: bool) -> None:
    values, residual = random(3, 5, 96, dtype=dtype) / 8, random(5, 96, dtype=dtype, seed=1)
    gain = random(96, dtype=dtype) / 4
    weights = random(5, 3, dtype=torch.float32, seed=2) if weighted else None
    live = torch.tensor([4], dtype=torch.int32) if weighted else None
    if weighted:
        values[:, 4] = torch.nan  # a row that is not live may hold anything
    terms = Terms(values, weights, live)
    moved = (None if each is None else each.to(device) for each in (weights, live))
    on_device = residual.to(device, copy=True)
    normed = triton_rms_norm(Terms(values.to(device), *moved), on_device, gain.to(device), 1e-5)
    if weighted:
        assert values[:, :4].isfinite().all()
        terms = Terms(values.nan_to_num(0.0), weights, live)
    expected, total = add_rms_norm(terms, residual, gain, 1e-5)
    close(on_device, total)
    close(normed, expected)
