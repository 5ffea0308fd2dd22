"""Makes a token's MLA latent and writes it into its page: the compressed KV normalised, the shared key turned."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from splitserve.kernels.kv_write import write_kv
from splitserve.kernels.rms_norm import rms_norm
from splitserve.kernels.rope import apply_rope_interleaved


def write_latent(
    latent: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write `latent` [tokens, rank + rope] into `cache_layer` [1, pages, 1, page_size, rank + rope], in place.

    The first `rank` numbers are normalised with weight `norm` [rank]; the others are an interleaved rotary key, turned
    by `cos` and `sin` [tokens, 1, rope] float32 into the NeoX form. `slot_mapping` [tokens] int64 as in `write_kv`.
    """
    if latent.is_cuda:
        triton_write_latent(latent, norm, eps, cos, sin, cache_layer, slot_mapping)
        return
    compressed, key = torch.split(latent.unsqueeze(1), [len(norm), latent.shape[1] - len(norm)], dim=-1)
    turned = apply_rope_interleaved(key, cos, sin)
    write_kv(cache_layer, (torch.cat((rms_norm(compressed, norm, eps), turned), dim=-1),), slot_mapping)


def triton_write_latent(
    latent: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """The same as one kernel; `latent` may be part of wider rows."""
    tokens, width = latent.shape
    rank = len(norm)
    if tokens:
        _write_latent[(tokens,)](
            latent, norm, cos, sin, cache_layer, slot_mapping, latent.stride(0), eps,
            rank=rank, half=(width - rank) // 2,
            block=triton.next_power_of_2(rank), block_half=triton.next_power_of_2((width - rank) // 2),
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _write_latent(  # type: ignore[no-untyped-def]
    latent, norm, cos, sin, cache_layer, slot_mapping, row_stride, eps,
    rank: tl.constexpr, half: tl.constexpr, block: tl.constexpr, block_half: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    source, target = latent + token * row_stride, cache_layer + slot * (rank + 2 * half)
    column = tl.arange(0, block)
    compressed = tl.load(source + column, mask=column < rank, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(compressed * compressed, axis=0) / rank + eps)
    normed = compressed * scale * tl.load(norm + column, mask=column < rank, other=0.0).to(tl.float32)
    tl.store(target + column, normed.to(cache_layer.dtype.element_ty), mask=column < rank)
    pair = tl.arange(0, block_half)
    low = tl.load(source + rank + 2 * pair, mask=pair < half, other=0.0).to(tl.float32)
    high = tl.load(source + rank + 2 * pair + 1, mask=pair < half, other=0.0).to(tl.float32)
    angle = token * 2 * half + half + pair  # the second half: there the sine has its own sign
    cosine, sine = tl.load(cos + angle, mask=pair < half), tl.load(sin + angle, mask=pair < half)
    turned_low, turned_high = low * cosine - high * sine, high * cosine + low * sine
    tl.store(target + rank + pair, turned_low.to(cache_layer.dtype.element_ty), mask=pair < half)
    tl.store(target + rank + half + pair, turned_high.to(cache_layer.dtype.element_ty), mask=pair < half)
