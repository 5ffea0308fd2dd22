"""Products of few rows against torch, by rows, widths and tiles."""

from __future__ import annotations

import pytest
import torch

from splitserve.kernels.launch import INTERPRETING
from splitserve.kernels.matmul import (
    GATE,
    MatmulTiles,
    choose_tiles,
    fixed_product,
    headwise_terms,
    headwise_tiles,
    product_terms,
)

DEVICE = "cpu" if INTERPRETING else "cuda"
ONE_STEP, LOOP = MatmulTiles(16, 64, 128, 2), MatmulTiles(16, 64, 32, 2)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected)
    assert error < (1e-6 if actual.dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiles", [ONE_STEP, LOOP, GATE], ids=str)
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 64, 256), (5, 70, 96), (17, 130, 64), (3, 16, 200)])
def test_product(dtype: torch.dtype, tiles: MatmulTiles, rows: int, columns: int, width: int) -> None:
    x, weight = random(rows, width + 8, dtype=dtype)[:, :width], random(columns, width, dtype=dtype, seed=1)
    terms = product_terms(x, weight, tiles)
    assert terms.dtype == (torch.float32 if len(terms) > 1 else dtype)
    close(terms.sum(0) if len(terms) > 1 else terms[0], x.double() @ weight.double().T)


@pytest.mark.parametrize("rows", [1, 20])
def test_heads(rows: int) -> None:
    x, weight = random(rows, 3, 48, dtype=torch.float32)[..., 16:], random(3, 24, 32, dtype=torch.float32, seed=1)
    out = torch.full((rows, 3, 40), torch.nan, device=DEVICE)
    headwise_terms(x, weight, headwise_tiles(rows, 32), out[..., :24].unsqueeze(0))
    close(out[..., :24], torch.einsum("thk,hnk->thn", x.double(), weight.double()))
    assert out[..., 24:].isnan().all()


def test_tensors_that_do_not_fit_are_refused() -> None:
    x, weight = random(2, 32, dtype=torch.float32), random(8, 32, dtype=torch.float32)
    for left, right, message in (
        (x[:, :16], weight, "does not fit"),
        (x.double(), weight, "does not fit"),
        (x.T.contiguous().T, weight, "contiguous"),
        (x, random(32, 8, dtype=torch.float32).T, "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            product_terms(left, right, ONE_STEP)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 17, 64])
@pytest.mark.parametrize(("columns", "width"), [(3648, 2048), (2048, 2048), (64, 2048), (2048, 1408)])
def test_tiles_for_real_shapes(rows: int, columns: int, width: int) -> None:
    x, weight = random(rows, width, dtype=torch.bfloat16), random(columns, width, dtype=torch.bfloat16, seed=1)
    tiles = choose_tiles(rows, width)
    assert tiles is not None
    for chosen in (tiles, GATE):
        close(product_terms(x, weight, chosen).sum(0), x.double() @ weight.double().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 64, 150])
def test_fixed_product(dtype: torch.dtype, rows: int) -> None:
    x, weight = random(rows, 200, dtype=dtype), random(70, 200, dtype=dtype, seed=1)
    close(fixed_product(x, weight), x.double() @ weight.double().T)


@pytest.mark.gpu
@pytest.mark.parametrize(("columns", "width"), [(3648, 2048), (2048, 2048), (4096, 512)])
def test_a_row_of_a_fixed_product_is_the_same_anywhere(columns: int, width: int) -> None:
    x, weight = random(3000, width, dtype=torch.bfloat16), random(columns, width, dtype=torch.bfloat16, seed=1)
    whole = fixed_product(x, weight)
    close(whole, x.double() @ weight.double().T)
    for first, last in ((0, 1), (5, 22), (1000, 1256), (2999, 3000), (7, 3000)):
        assert torch.equal(fixed_product(x[first:last], weight), whole[first:last])
