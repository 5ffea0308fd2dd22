"""Products of few rows against torch, by rows, widths and tiles."""

from __future__ import annotations

import pytest
import torch

from splitserve.kernels.launch import INTERPRETING
from splitserve.kernels.matmul import (
    FIXED,
    GATE,
    MatmulTiles,
    choose_tiles,
    headwise_terms,
    headwise_tiles,
    product,
    product_terms,
)

DEVICE = "cpu" if INTERPRETING else "cuda"
ONE_STEP, LOOP = MatmulTiles(16, 64, 128, 2), MatmulTiles(16, 64, 32, 2)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(actual: torch.Tensor, expected: torch.Tensor, bound: float = 1e-6) -> None:
    error = torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected)
    assert error < (bound if actual.dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiles", [ONE_STEP, LOOP, GATE], ids=str)
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 64, 256), (5, 70, 96), (17, 130, 64), (3, 16, 200)])
def test_product(dtype: torch.dtype, tiles: MatmulTiles, rows: int, columns: int, width: int) -> None:
    x, weight = random(rows, width + 8, dtype=dtype)[:, :width], random(columns, width, dtype=dtype, seed=1)
    expected = x.double() @ weight.double().T
    close(product_terms(x, weight, tiles).sum(0), expected)
    close(product(x, weight), expected)


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
    with pytest.raises(ValueError, match="one split"):
        product(x, weight, ONE_STEP)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 17, 64])
@pytest.mark.parametrize(("columns", "width"), [(3648, 2048), (2048, 2048), (64, 2048), (2048, 1408)])
def test_tiles_for_real_shapes(rows: int, columns: int, width: int) -> None:
    x, weight = random(rows, width, dtype=torch.bfloat16), random(columns, width, dtype=torch.bfloat16, seed=1)
    for chosen in (choose_tiles(rows, columns, width) or FIXED, GATE):
        # Tensor cores cut sums off instead of rounding them: 2e-6 over 2048 products in one chain.
        close(product_terms(x, weight, chosen).sum(0), x.double() @ weight.double().T, bound=4e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("columns", "width"), [(3648, 2048), (64, 2048), (2048, 10944), (512, 128)])
def test_a_row_has_the_same_bits_among_any_number(columns: int, width: int) -> None:
    x, weight = random(8192, width, dtype=torch.bfloat16), random(columns, width, dtype=torch.bfloat16, seed=1)
    for tiles in (FIXED, GATE):
        expected = product_terms(x, weight, tiles)
        for first, rows in ((0, 1), (7, 16), (100, 64), (5000, 256), (3000, 1000)):
            assert torch.equal(product_terms(x[first : first + rows], weight, tiles), expected[:, first : first + rows])


@pytest.mark.gpu
def test_a_head_has_the_same_bits_among_any_number_of_rows() -> None:
    x, weight = random(3000, 16, 512, dtype=torch.bfloat16), random(16, 128, 512, dtype=torch.bfloat16, seed=1)
    expected = torch.empty(1, 3000, 16, 128, device=DEVICE, dtype=torch.bfloat16)
    headwise_terms(x, weight, FIXED, expected)
    for first, rows in ((0, 1), (9, 16), (70, 256)):
        out = torch.empty_like(expected[:, :rows])
        headwise_terms(x[first : first + rows], weight, FIXED, out)
        assert torch.equal(out, expected[:, first : first + rows])
