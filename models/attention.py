"""Multi-head and grouped-query attention over this rank's heads."""

from __future__ import annotations

from typing import Protocol

import torch

from splitserve.kernels.kv_write import write_kv
from splitserve.kernels.rms_norm import Terms, rms_norm
from splitserve.kernels.rope import apply_rope
from splitserve.models.config import ModelConfig
from splitserve.models.layers import Linear, NamedTensors, NewTensor, RowParallelLinear, TensorParallel, parts

Angles = tuple[torch.Tensor, torch.Tensor]


class Sequences(Protocol):
    """A step's sequences, and how their queries meet what the cache holds of them."""

    def attend(
        self, q: torch.Tensor, cache_layer: torch.Tensor, scale: float, value_dim: int | None = None
    ) -> torch.Tensor:
        """Attend from `q` [tokens, heads, dim] -> [tokens, heads, dim or value_dim], as `paged_attention` does."""

    def live_rows(self, rows: int) -> torch.Tensor:
        """How many of a layer's `rows` count, int32 [1] on the device; the others are padding."""


class Attention(Protocol):
    """One layer's attention: keys and values first, so that they can travel while the rest is computed."""

    def named_weights(self) -> NamedTensors: ...

    def pack(self, deterministic: bool = False) -> None: ...

    def project(
        self, x: torch.Tensor, angles: Angles, cache_layer: torch.Tensor, slot_mapping: torch.Tensor
    ) -> torch.Tensor:
        """Write what later tokens need of `x` [tokens, hidden] into the cache; returns the queries."""

    def attend(self, q: torch.Tensor, cache_layer: torch.Tensor, sequences: Sequences) -> torch.Tensor | Terms:
        """Attend from `q` over the cache and project back -> [tokens, hidden]."""


class GroupedQueryAttention:
    """Query heads share KV heads in groups; KV heads are repeated where ranks outnumber them."""

    def __init__(self, config: ModelConfig, new: NewTensor, tp: TensorParallel) -> None:
        self._heads = config.num_heads // tp.size
        self._kv_heads = max(1, config.num_kv_heads // tp.size)
        self._dim, self._eps = config.head_dim, config.rms_norm_eps
        self._split = [self._heads * self._dim, self._kv_heads * self._dim, self._kv_heads * self._dim]
        self._qkv = Linear(config.hidden_size, sum(self._split), config.qkv_bias, new)
        self._output = RowParallelLinear(
            config.num_heads * config.head_dim, config.hidden_size, config.output_bias, new, tp
        )
        self._norms = (new(self._dim), new(self._dim)) if config.qk_norm else None

    def named_weights(self) -> NamedTensors:
        yield from parts(("q_proj", "k_proj", "v_proj"), self._qkv, self._split)
        yield from parts(("o_proj",), self._output)
        if self._norms:
            yield from zip(("q_norm.weight", "k_norm.weight"), self._norms, strict=True)

    def pack(self, deterministic: bool = False) -> None:
        self._qkv.pack(deterministic)
        self._output.pack(deterministic)

    def project(
        self, x: torch.Tensor, angles: Angles, cache_layer: torch.Tensor, slot_mapping: torch.Tensor
    ) -> torch.Tensor:
        """Queries [tokens, heads, dim], turned to their positions."""
        heads = self._qkv(x).view(len(x), -1, self._dim)
        turning, v = torch.split(heads, [self._heads + self._kv_heads, self._kv_heads], dim=1)
        if self._norms:
            q, k = torch.split(turning, [self._heads, self._kv_heads], dim=1)
            q_norm, k_norm = self._norms
            turning = torch.cat((rms_norm(q, q_norm, self._eps), rms_norm(k, k_norm, self._eps)), dim=1)
        q, k = torch.split(apply_rope(turning, *angles), [self._heads, self._kv_heads], dim=1)
        write_kv(cache_layer, (k, v), slot_mapping)
        return q

    def attend(self, q: torch.Tensor, cache_layer: torch.Tensor, sequences: Sequences) -> torch.Tensor | Terms:
        return self._output.terms(sequences.attend(q, cache_layer, self._dim**-0.5).flatten(1))
