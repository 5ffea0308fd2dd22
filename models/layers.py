"""Linear layers and embeddings cut over the ranks of a tensor parallel group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from splitserve.kernels import matmul
from splitserve.kernels.rms_norm import Terms

UPCAST_ROWS = 4
UPCAST_ELEMENTS = 1 << 20

NewTensor = Callable[..., torch.Tensor]
NamedTensors = Iterator[tuple[str, torch.Tensor]]


class TensorParallel(Protocol):
    """The ranks that share one model; every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of all ranks' `x`, on every rank; may reuse x."""

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """All ranks' `x` joined along `dim` in the order of ranks, on every rank."""


class SingleRank:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return x


def pack(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [out, in] in the form `linear` is fastest with. On a CPU, weights are laid out in blocks for oneDNN.

    oneDNN adds up each float32 row in one order whatever the number of rows, columns or threads, so that a row's bits
    do not depend on the other rows; MKL's products do not promise that. bfloat16 is packed only where the CPU has
    instructions for it.
    """
    if weight.is_cpu and (weight.dtype == torch.float32 or _has_fast_bfloat16()):
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return packed
    return weight


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, fixed: bool = False
) -> torch.Tensor:
    """`x` [rows, in] times packed `weight` [out, in] transposed, plus `bias` [out].

    `fixed`: on a GPU a row's bits do not depend on how many rows there are, as on a CPU they never do.
    """
    if fixed and x.is_cuda:
        product = matmul.product(x, weight)
        return product if bias is None else product.add_(bias)
    if weight.is_mkldnn:
        packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return packed
    if x.is_cpu and x.dtype == torch.bfloat16 and len(x) >= UPCAST_ROWS:
        return _upcast_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _has_fast_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _upcast_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Without bfloat16 instructions (else the weight were packed) torch multiplies one row at a time; float32 by slices
    that stay in the cache is several times faster."""
    step = max(1, UPCAST_ELEMENTS // weight.shape[1])
    wide = x.float()
    product = torch.cat([F.linear(wide, part.float()) for part in torch.split(weight, step)], dim=-1)
    return (product if bias is None else product.add_(bias)).to(x.dtype)


class Linear:
    """Weight [out, in] and optional bias [out], uncut or cut by output columns. To be packed once it is filled."""

    def __init__(self, in_features: int, out_features: int, bias: bool, new: NewTensor) -> None:
        self.weight = new(out_features, in_features)
        self.bias = new(out_features) if bias else None
        self._fixed = False

    def pack(self, deterministic: bool) -> None:
        self.weight, self._fixed = pack(self.weight), deterministic

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias, self._fixed)

    def terms(self, x: torch.Tensor) -> torch.Tensor | Terms:
        """The same for a reader that adds terms up itself, where that is faster."""
        splits = x.is_cuda and self.bias is None and not self._fixed
        tiles = matmul.choose_tiles(len(x), *self.weight.shape) if splits else None
        return self(x) if tiles is None else Terms(matmul.product_terms(x, self.weight, tiles))


class RowParallelLinear(Linear):
    """Each rank multiplies its part of the input columns; the sum over ranks gets the bias, which all ranks hold."""

    def __init__(self, in_features: int, out_features: int, bias: bool, new: NewTensor, tp: TensorParallel) -> None:
        super().__init__(in_features // tp.size, out_features, bias, new)
        self._tp = tp

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        total = self._tp.all_reduce(linear(x, self.weight, fixed=self._fixed))
        return total if self.bias is None else total.add_(self.bias)

    def terms(self, x: torch.Tensor) -> torch.Tensor | Terms:
        return super().terms(x) if self._tp.size == 1 else self(x)


class HeadwiseLinear:
    """A product of its own for each head. `weight` [heads, out, in] is packed here."""

    def __init__(self, weight: torch.Tensor, deterministic: bool) -> None:
        self.weight, self._fixed = weight, deterministic
        self._packed = [pack(head) for head in weight] if weight.is_cpu else []

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """`x` [tokens, heads, in] into `out` [tokens, heads, out], which may be part of wider heads."""
        if x.is_cuda and (self._fixed or len(x) <= matmul.FEW_ROWS):
            tiles = matmul.FIXED if self._fixed else matmul.headwise_tiles(len(x), x.shape[2])
            matmul.headwise_terms(x, self.weight, tiles, out.unsqueeze(0))
            return
        if x.is_cuda:
            torch.bmm(x.transpose(0, 1), self.weight.transpose(1, 2), out=out.transpose(0, 1))
            return
        for head, weight in enumerate(self._packed):
            out[:, head] = linear(x[:, head], weight)


class VocabParallelEmbedding:
    """Rows of the vocabulary cut over ranks, padded to a multiple of them."""

    def __init__(self, vocab_size: int, hidden_size: int, new: NewTensor, tp: TensorParallel) -> None:
        rows = -(-vocab_size // tp.size)
        self.weight = new(rows, hidden_size)
        self._first, self._tp = tp.rank * rows, tp

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [tokens] -> [tokens, hidden]."""
        if self._tp.size == 1:
            return torch.embedding(self.weight, token_ids)
        local = token_ids - self._first
        here = (local >= 0) & (local < self.weight.shape[0])
        rows = torch.embedding(self.weight, local.where(here, 0))
        return self._tp.all_reduce(rows.masked_fill_(~here.unsqueeze(-1), 0))


class VocabParallelHead:
    """Scores every word of the vocabulary by `weight`, this rank's padded rows of it (the embedding's, if tied)."""

    def __init__(self, vocab_size: int, weight: torch.Tensor, tp: TensorParallel) -> None:
        self.weight = weight
        self._vocab_size, self._tp = vocab_size, tp
        self._fixed = False

    def pack(self, deterministic: bool) -> None:
        self.weight, self._fixed = pack(self.weight), deterministic

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, hidden] -> scores [rows, vocab] of their dtype, on every rank."""
        return self._tp.all_gather(linear(hidden, self.weight, fixed=self._fixed), -1)[:, : self._vocab_size]


def prefixed(prefix: str, weights: NamedTensors) -> NamedTensors:
    for name, tensor in weights:
        yield f"{prefix}.{name}", tensor


def parts(names: Sequence[str], fused: Linear, widths: list[int] | None = None) -> NamedTensors:
    """Weights and biases of the projections `names`, whose `widths` of output rows are fused into one."""
    widths = widths or [len(fused.weight)]
    for name, part in zip(names, torch.split(fused.weight, widths), strict=True):
        yield f"{name}.weight", part
    if fused.bias is not None:
        for name, part in zip(names, torch.split(fused.bias, widths), strict=True):
            yield f"{name}.bias", part
