"""Makes a token's MLA latent and writes it into its page: the compressed KV normalised, the shared key turned."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from splitserve.kernels.kv_write import write_kv
from splitserve.kernels.rms_norm import load_terms, rms_norm
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
            RANK=rank, HALF=(width - rank) // 2,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _write_latent(  # type: ignore[no-untyped-def]
    latent, norm, cos, sin, cache_layer, slot_mapping, row_stride, eps, RANK: tl.constexpr, HALF: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    write_token(latent, norm, cos, sin, cache_layer, slot_mapping, token, 0, row_stride, eps, 1, RANK, HALF)


@triton.jit  # type: ignore[untyped-decorator]
def write_token(  # type: ignore[no-untyped-def]
    latent, norm, cos, sin, cache_layer, slot_mapping, token, term_stride, row_stride, eps,
    TERMS: tl.constexpr, RANK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Write one token's latent, which may still be the terms of a sum."""
    dtype = cache_layer.dtype.element_ty
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        target = cache_layer + slot * (RANK + 2 * HALF)
        column = tl.arange(0, triton.next_power_of_2(RANK))
        within = column < RANK
        compressed = load_terms(latent, None, token, column, within, term_stride, row_stride, TERMS)
        compressed = compressed.to(dtype).to(tl.float32)
        scale = tl.rsqrt(tl.sum(compressed * compressed, axis=0) / RANK + eps)
        normed = compressed * scale * tl.load(norm + column, mask=within, other=0.0).to(tl.float32)
        tl.store(target + column, normed.to(dtype), mask=within)
        pair = tl.arange(0, triton.next_power_of_2(HALF))
        real = pair < HALF
        low = load_terms(latent + RANK, None, token, 2 * pair, real, term_stride, row_stride, TERMS)
        high = load_terms(latent + RANK + 1, None, token, 2 * pair, real, term_stride, row_stride, TERMS)
        low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
        angle = token * 2 * HALF + HALF + pair  # the second half: there the sine has its own sign
        cosine, sine = tl.load(cos + angle, mask=real), tl.load(sin + angle, mask=real)
        tl.store(target + RANK + pair, (low * cosine - high * sine).to(dtype), mask=real)
        tl.store(target + RANK + HALF + pair, (high * cosine + low * sine).to(dtype), mask=real)
