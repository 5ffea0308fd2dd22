"""Dense products of few rows: x @ weight^T, bound by the time to read the weight.

The weight is the M operand of the MMA and the rows are the N operand, which allows wgmma for any number of rows. K is
cut over `splits` programs, each of which asks for its first tile of the weight before the kernel in front has ended
(programmatic dependent launch): a weight is nobody's result. Partial sums are left as terms, for the kernel behind to
add in order (`rms_norm.Terms`); all tiles are fixed, so a row's bits do not depend on the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from splitserve.kernels.launch import INTERPRETING
from splitserve.kernels.prefetch import prefetch_l2


@dataclass(frozen=True)
class MatmulTiles:
    """A program computes `block_n` columns of `block_m` rows over one of `splits` parts of K, `block_k` at a time.

    `in_order`: kernels behind this one begin once the one in front has ended, and may read what that wrote.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int
    warps: int = 4
    stages: int = 3
    in_order: bool = False


FEW_ROWS = 256  # up to which products of heads are faster here than torch's
GATE = MatmulTiles(16, 64, 256, 8, in_order=True)  # a router's few columns
FIXED = MatmulTiles(64, 64, 128, 1, stages=4)  # for bits that may not depend on the number of rows


def choose_tiles(rows: int, columns: int, width: int) -> MatmulTiles | None:
    """The tiles for `rows` rows; None where torch's product is as fast. Measured on an H100; see docs/LOG.md."""
    if rows <= 16:
        return MatmulTiles(16, 64, 512, triton.cdiv(width, 512))
    return MatmulTiles(64, 64, 128, 1, stages=5) if rows <= 64 and columns <= 2048 else None


def headwise_tiles(rows: int, width: int) -> MatmulTiles:
    """For products of many heads: no split of K, so that the product needs no sum behind it."""
    if rows <= 16:
        return MatmulTiles(16, 64, triton.next_power_of_2(width), 1)
    return MatmulTiles(32, 64, 512, 1, warps=8, stages=2) if rows <= 128 else MatmulTiles(64, 64, 512, 1, 8, 2)


def product(x: torch.Tensor, weight: torch.Tensor, tiles: MatmulTiles = FIXED) -> torch.Tensor:
    """x @ weight^T [rows, out] in x's dtype, by tiles of one split. Raises ValueError for others."""
    if tiles.splits != 1:
        raise ValueError(f"a product needs tiles of one split: {tiles}")
    return product_terms(x, weight, tiles, x.dtype)[0]


def product_terms(
    x: torch.Tensor, weight: torch.Tensor, tiles: MatmulTiles, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Terms [splits, rows, out] of `dtype` whose sum is x @ weight^T.

    `x` [rows, in], whose rows may be apart, and `weight` [out, in], contiguous, of one dtype.
    """
    columns = len(weight)
    out = torch.empty(_splits(tiles, x.shape[-1]), len(x), 1, columns, dtype=dtype, device=x.device)
    headwise_terms(x.unsqueeze(1), weight.unsqueeze(0), tiles, out)
    return out.squeeze(2)


def headwise_terms(x: torch.Tensor, weight: torch.Tensor, tiles: MatmulTiles, out: torch.Tensor) -> None:
    """The same for each head: `x` [rows, heads, in] by `weight` [heads, out, in] into `out` [splits, rows, heads, out].

    Only the last dimensions of x and out have to be contiguous. Raises ValueError for tensors that do not fit together.
    """
    (rows, heads, width), (_, columns, _) = x.shape, weight.shape
    if weight.shape != (heads, columns, width) or x.dtype != weight.dtype:
        raise ValueError(f"x {x.dtype} {tuple(x.shape)} does not fit a weight {weight.dtype} {tuple(weight.shape)}")
    if x.stride(2) != 1 or not weight.is_contiguous():
        raise ValueError("the last dimension of x and all of weight must be contiguous")
    splits = _splits(tiles, width)
    steps = triton.cdiv(triton.cdiv(width, tiles.block_k), splits)
    tma = steps > 1 and heads == 1 and width * x.itemsize % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0
    x_tiles = TensorDescriptor.from_tensor(x[:, 0], [tiles.block_m, tiles.block_k]) if tma else x
    weight_tiles = TensorDescriptor.from_tensor(weight[0], [tiles.block_n, tiles.block_k]) if tma else weight
    grid = (triton.cdiv(columns, tiles.block_n) * triton.cdiv(rows, tiles.block_m), heads, splits)
    if rows:
        _matmul_kernel[grid](
            x, weight, x_tiles, weight_tiles, out, rows,
            x.stride(0), x.stride(1), out.stride(0), out.stride(1), out.stride(2),
            N=columns, K=width, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
            ALIGNED=columns % 16 == 0 and out.stride(0) % 16 == 0, STEPS=steps, TMA=tma,
            UPCAST=INTERPRETING and x.dtype != torch.float32,
            IN_ORDER=tiles.in_order, PDL=not INTERPRETING, launch_pdl=not INTERPRETING,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


def _splits(tiles: MatmulTiles, width: int) -> int:
    """No more splits than blocks of K."""
    return min(tiles.splits, -(-width // tiles.block_k))


@triton.jit  # type: ignore[untyped-decorator]
def _load_tile(base, row, count, stride, k, K: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    ks = k + tl.arange(0, BLOCK_K)
    mask = (row < count)[:, None]
    if K % BLOCK_K:
        mask = mask & (ks < K)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + ks[None, :], mask=mask, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _multiply_add(weights, tokens, acc, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    if UPCAST:
        weights, tokens = weights.to(tl.float32), tokens.to(tl.float32)
    return tl.dot(weights, tl.trans(tokens), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "out_split_stride"])  # type: ignore[untyped-decorator]
def _matmul_kernel(  # type: ignore[no-untyped-def]
    x, weight, x_tiles, weight_tiles, out, rows,
    x_stride, x_head_stride, out_split_stride, out_stride, out_head_stride,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr, STEPS: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
    IN_ORDER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, head, split). Tiles of the same columns stand side by side and share the weight in L2."""
    if PDL and not IN_ORDER:
        gdc_launch_dependents()
    if ALIGNED:
        out_split_stride = tl.multiple_of(out_split_stride, 16)
    row_tiles = tl.cdiv(rows, BLOCK_M)
    head, split = tl.program_id(1), tl.program_id(2)
    first_row, first_column = tl.program_id(0) % row_tiles * BLOCK_M, tl.program_id(0) // row_tiles * BLOCK_N
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    x += head * x_head_stride
    weight += head.to(tl.int64) * (N * K)
    first = split * (STEPS * BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if STEPS == 1:
        weights = _load_tile(weight, column, N, K, first, K, BLOCK_K)
        if PDL:
            gdc_wait()
            if IN_ORDER:
                gdc_launch_dependents()
        acc = _multiply_add(weights, _load_tile(x, row, rows, x_stride, first, K, BLOCK_K), acc, UPCAST)
    else:
        if PDL:
            if K % (STEPS * BLOCK_K) == 0:
                size: tl.constexpr = STEPS * BLOCK_K * weight.dtype.element_ty.primitive_bitwidth // 8
                prefetch_l2(weight + tl.minimum(column, N - 1) * K + first, size)
            gdc_wait()
            if IN_ORDER:
                gdc_launch_dependents()
        for step in range(STEPS):
            k = first + step * BLOCK_K
            if TMA:
                weights, tokens = weight_tiles.load([first_column, k]), x_tiles.load([first_row, k])
            else:
                weights = _load_tile(weight, column, N, K, k, K, BLOCK_K)
                tokens = _load_tile(x, row, rows, x_stride, k, K, BLOCK_K)
            acc = _multiply_add(weights, tokens, acc, UPCAST)
    target = out + split * out_split_stride + head * out_head_stride + row.to(tl.int64)[:, None] * out_stride
    within = (row < rows)[:, None] & (column < N)[None, :]
    tl.store(target + column[None, :], tl.trans(acc).to(out.dtype.element_ty), mask=within)
