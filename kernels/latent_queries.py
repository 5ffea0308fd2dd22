"""MLA's last step before attention: absorbed and turned queries, and the token's latent in its page, as one kernel.

Three kinds of work that need nothing of each other share a launch: a head's strip of absorbed queries for a block of
tokens, one token's rotary parts, and one token's latent. Weights are loaded before the kernel in front has ended.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from splitserve.kernels.latent_write import write_latent, write_token
from splitserve.kernels.launch import INTERPRETING
from splitserve.kernels.rms_norm import load_terms
from splitserve.kernels.rope import apply_rope_interleaved

STRIP = 64  # columns of the absorbed queries that a program computes


def latent_queries(
    q: torch.Tensor,
    latent: torch.Tensor,
    absorb: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    block_tokens: int | None = None,
) -> torch.Tensor:
    """Queries [tokens, heads, rank + rope] in the cache's dtype, and the latents written as `write_latent` does.

    `q` [terms, tokens, heads * (plain + rope)] and `latent` [terms, tokens, rank + rope] are sums still to be taken,
    added in order in float32 and rounded to the cache's dtype; they may be parts of wider rows. `absorb` [heads, rank,
    plain] turns the plain part of each head into rank numbers; the rotary part is turned by `cos` and `sin` [tokens,
    1, rope] float32 from the interleaved form into the NeoX form. `plain` and `rope` are powers of two from 16 on.
    Bits do not depend on `block_tokens`' neighbours, only on it.
    """
    (heads, rank, plain), (terms, tokens, width) = absorb.shape, latent.shape
    rope = width - rank
    if q.shape != (terms, tokens, heads * (plain + rope)) or not absorb.is_contiguous() or len(norm) != rank:
        raise ValueError(f"q {tuple(q.shape)}, latent {tuple(latent.shape)}, absorb {tuple(absorb.shape)} do not fit")
    queries = torch.empty(tokens, heads, width, dtype=cache_layer.dtype, device=q.device)
    block_tokens = block_tokens or (16 if tokens <= 16 else 64)
    strips = triton.cdiv(rank, STRIP) * triton.cdiv(tokens, block_tokens)
    if tokens:
        _latent_queries[(strips * heads + 2 * tokens,)](
            q, latent, absorb, norm, cos, sin, cache_layer, slot_mapping, queries, tokens, strips,
            q.stride(0), q.stride(1), latent.stride(0), latent.stride(1), eps,
            TERMS=terms, HEADS=heads, RANK=rank, PLAIN=plain, HALF=rope // 2, BLOCK_M=block_tokens, BLOCK_N=STRIP,
            UPCAST=INTERPRETING, PDL=not INTERPRETING, launch_pdl=not INTERPRETING, num_warps=4,
        )  # fmt: skip
    return queries


def latent_queries_reference(
    q: torch.Tensor,
    latent: torch.Tensor,
    absorb: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """The same in torch."""
    dtype, rank, plain = cache_layer.dtype, absorb.shape[1], absorb.shape[2]
    write_latent(latent.sum(0).to(dtype), norm, eps, cos, sin, cache_layer, slot_mapping)
    heads = q.sum(0).to(dtype).unflatten(-1, (len(absorb), -1))  # type: ignore[no-untyped-call]
    absorbed = torch.einsum("thp,hrp->thr", heads[..., :plain].float(), absorb.float()).to(dtype)
    turned = apply_rope_interleaved(heads[..., plain:], cos, sin)
    assert absorbed.shape[-1] == rank
    return torch.cat((absorbed, turned), dim=-1)


@triton.jit(do_not_specialize=["tokens", "strips"])  # type: ignore[untyped-decorator]
def _latent_queries(  # type: ignore[no-untyped-def]
    q, latent, absorb, norm, cos, sin, cache_layer, slot_mapping, queries, tokens, strips,
    q_term_stride, q_stride, latent_term_stride, latent_stride, eps,
    TERMS: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr, PLAIN: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    if program < strips * HEADS:
        _absorb(
            q, absorb, queries, program // strips, program % strips, tokens, q_term_stride, q_stride,
            TERMS, RANK, PLAIN, HALF, HEADS, BLOCK_M, BLOCK_N, UPCAST, PDL,
        )  # fmt: skip
    else:
        if PDL:
            gdc_wait()
        token = (program - strips * HEADS).to(tl.int64)
        if token < tokens:
            write_token(
                latent, norm, cos, sin, cache_layer, slot_mapping, token, latent_term_stride, latent_stride, eps,
                TERMS, RANK, HALF,
            )  # fmt: skip
        else:
            _turn(q, cos, sin, queries, token - tokens, q_term_stride, q_stride, TERMS, RANK, PLAIN, HALF, HEADS)


@triton.jit  # type: ignore[untyped-decorator]
def _absorb(  # type: ignore[no-untyped-def]
    q, absorb, queries, head, strip, tokens, term_stride, row_stride,
    TERMS: tl.constexpr, RANK: tl.constexpr, PLAIN: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, BLOCK_M)
    token = (strip % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = strip // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    plain = tl.arange(0, PLAIN)
    weights = tl.load(
        absorb + head * (RANK * PLAIN) + column[:, None] * PLAIN + plain[None, :],
        mask=(column < RANK)[:, None],
        other=0.0,
    )
    if PDL:
        gdc_wait()
    columns = tl.broadcast_to(head * (PLAIN + 2 * HALF) + plain[None, :], [BLOCK_M, PLAIN])
    real = tl.broadcast_to((token < tokens)[:, None], [BLOCK_M, PLAIN])
    plain_part = load_terms(q, None, token[:, None], columns, real, term_stride, row_stride, TERMS)
    plain_part = plain_part.to(queries.dtype.element_ty)
    if UPCAST:
        weights, plain_part = weights.to(tl.float32), plain_part.to(tl.float32)
    absorbed = tl.trans(tl.dot(weights, tl.trans(plain_part), input_precision="ieee"))
    target = queries + (token[:, None] * HEADS + head) * (RANK + 2 * HALF) + column[None, :]
    within = (token < tokens)[:, None] & (column < RANK)[None, :]
    tl.store(target, absorbed.to(queries.dtype.element_ty), mask=within)


@triton.jit  # type: ignore[untyped-decorator]
def _turn(  # type: ignore[no-untyped-def]
    q, cos, sin, queries, token, term_stride, row_stride,
    TERMS: tl.constexpr, RANK: tl.constexpr, PLAIN: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    dtype = queries.dtype.element_ty
    head = tl.arange(0, triton.next_power_of_2(HEADS))[:, None]
    pair = tl.arange(0, 2 * HALF)[None, :]
    real = (head < HEADS) & (pair < 2 * HALF)
    columns = head * (PLAIN + 2 * HALF) + PLAIN + pair
    both = load_terms(q, None, token, columns, real, term_stride, row_stride, TERMS).to(dtype).to(tl.float32)
    low, high = tl.split(tl.reshape(both, [triton.next_power_of_2(HEADS), HALF, 2]))
    half = tl.arange(0, HALF)[None, :]
    angle = token * 2 * HALF + HALF + half  # the second half: there the sine has its own sign
    cosine, sine = tl.load(cos + angle), tl.load(sin + angle)
    target = queries + (token * HEADS + head) * (RANK + 2 * HALF) + RANK + half
    tl.store(target, (low * cosine - high * sine).to(dtype), mask=head < HEADS)
    tl.store(target + HALF, (high * cosine + low * sine).to(dtype), mask=head < HEADS)
