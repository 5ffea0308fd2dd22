"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), in its absorbed form.

The cache keeps one latent a token: the compressed KV and the rotary key that all heads share. With the up-projection
of keys moved over to the queries and that of values behind the attention, every head attends over the latents
themselves, as to one KV head whose values are the first `kv_lora_rank` numbers of its keys.
"""

from __future__ import annotations

import torch

from splitserve.kernels.latent_queries import latent_queries
from splitserve.kernels.latent_write import write_latent
from splitserve.kernels.rms_norm import Terms, rms_norm
from splitserve.kernels.rope import apply_rope_interleaved
from splitserve.models.attention import Angles, Sequences
from splitserve.models.config import MlaConfig, ModelConfig
from splitserve.models.layers import (
    DECODE_ROWS,
    HeadwiseLinear,
    Linear,
    NamedTensors,
    NewTensor,
    RowParallelLinear,
    TensorParallel,
    parts,
)
from splitserve.models.rope import softmax_scale


class LatentAttention:
    """This rank's query heads; the latent and its projection are whole on every rank.

    With q-LoRA, queries come through a narrow, normalised middle of `q_lora_rank`.
    """

    def __init__(self, config: ModelConfig, mla: MlaConfig, new: NewTensor, tp: TensorParallel) -> None:
        self._mla, self._eps = mla, config.rms_norm_eps
        self._heads = config.num_heads // tp.size
        self._scale = softmax_scale(config.rope, config.head_dim)
        queries = self._heads * config.head_dim
        self._split = [mla.q_lora_rank or queries, mla.latent_dim]
        self._down = Linear(config.hidden_size, sum(self._split), False, new)
        self._query_norm = new(mla.q_lora_rank) if mla.q_lora_rank else None
        self._query_up = Linear(mla.q_lora_rank, queries, False, new) if mla.q_lora_rank else None
        self._latent_norm = new(mla.kv_lora_rank)
        self._up = new(self._heads, mla.qk_nope_head_dim + mla.v_head_dim, mla.kv_lora_rank)
        self._output = RowParallelLinear(config.num_heads * mla.v_head_dim, config.hidden_size, False, new, tp)

    def named_weights(self) -> NamedTensors:
        first = "q_proj" if self._query_up is None else "q_a_proj"
        yield from parts((first, "kv_a_proj_with_mqa"), self._down, self._split)
        if self._query_norm is not None and self._query_up is not None:
            yield "q_a_layernorm.weight", self._query_norm
            yield from parts(("q_b_proj",), self._query_up)
        yield "kv_a_layernorm.weight", self._latent_norm
        yield "kv_b_proj.weight", self._up.flatten(0, 1)
        yield from parts(("o_proj",), self._output)

    def pack(self, deterministic: bool = False) -> None:
        self._deterministic = deterministic
        key_up, value_up = torch.split(self._up, [self._mla.qk_nope_head_dim, self._mla.v_head_dim], dim=1)
        self._absorb_keys = HeadwiseLinear(key_up.transpose(1, 2).contiguous(), deterministic)
        self._expand_values = HeadwiseLinear(value_up.contiguous(), deterministic)
        del self._up
        self._down.pack(deterministic)
        self._output.pack(deterministic)
        if self._query_up is not None:
            self._query_up.pack(deterministic)

    def project(
        self, x: torch.Tensor, angles: Angles, cache_layer: torch.Tensor, slot_mapping: torch.Tensor
    ) -> torch.Tensor:
        """Queries [tokens, heads, latent_dim]: the absorbed part, then the rotary one."""
        mla = self._mla
        if x.is_cuda and (self._deterministic or len(x) <= DECODE_ROWS):
            return self._queries(x, angles, cache_layer, slot_mapping)
        q, latent = torch.split(self._down(x), self._split, dim=-1)
        write_latent(latent, self._latent_norm, self._eps, *angles, cache_layer, slot_mapping)
        if self._query_norm is not None and self._query_up is not None:
            q = self._query_up(rms_norm(q, self._query_norm, self._eps))
        q = q.unflatten(-1, (self._heads, -1))  # type: ignore[no-untyped-call]
        plain, turning = torch.split(q, [mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=-1)
        queries = torch.empty(len(x), self._heads, mla.latent_dim, dtype=x.dtype, device=x.device)
        absorbed, turned = torch.split(queries, [mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)
        self._absorb_keys(plain, absorbed)
        apply_rope_interleaved(turning, *angles, out=turned)
        return queries

    def _queries(
        self, x: torch.Tensor, angles: Angles, cache_layer: torch.Tensor, slot_mapping: torch.Tensor
    ) -> torch.Tensor:
        """`project` in two kernels, or four with q-LoRA."""
        down = self._down.terms(x)
        q, latent = torch.split(_values(down), self._split, dim=-1)
        if self._query_norm is not None and self._query_up is not None:
            q = rms_norm(q.sum(0).to(x.dtype), self._query_norm, self._eps)
            q = self._query_up(q).unsqueeze(0)
            latent = latent.sum(0, keepdim=True)
        weights = (self._absorb_keys.weight, self._latent_norm, self._eps)
        block = 64 if self._deterministic else None
        return latent_queries(q, latent, *weights, *angles, cache_layer, slot_mapping, block_tokens=block)

    def attend(self, q: torch.Tensor, cache_layer: torch.Tensor, sequences: Sequences) -> torch.Tensor | Terms:
        mixed = sequences.attend(q, cache_layer, self._scale, self._mla.kv_lora_rank)
        values = mixed.new_empty(len(q), self._heads, self._mla.v_head_dim)
        self._expand_values(mixed, values)
        return self._output.terms(values.flatten(1))


def _values(sum_of: torch.Tensor | Terms) -> torch.Tensor:
    """[terms, rows, dim]"""
    return sum_of.values if isinstance(sum_of, Terms) else sum_of.unsqueeze(0)
