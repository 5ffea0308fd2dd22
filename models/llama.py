"""The dense decoder of Llama, SmolLM2, Qwen2 and Qwen3: RMSNorm, rotary grouped-query attention, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from splitserve.kernels.kv_write import write_kv
from splitserve.kernels.paged_attention import AttentionMetadata, paged_attention
from splitserve.kernels.rms_norm import add_rms_norm, rms_norm
from splitserve.kernels.rope import apply_rope
from splitserve.kernels.silu_and_mul import silu_and_mul
from splitserve.models.config import ModelConfig
from splitserve.models.layers import (
    Linear,
    NewTensor,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from splitserve.models.rope import RopeTable

NamedTensors = Iterator[tuple[str, torch.Tensor]]


class Attention:
    """Grouped-query attention over this rank's heads; KV heads are repeated where ranks outnumber them."""

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
        names = ("q_proj", "k_proj", "v_proj")
        yield from _parts(names, self._qkv, self._split)
        yield from _parts(("o_proj",), self._output)
        if self._norms:
            yield from zip(("q_norm.weight", "k_norm.weight"), self._norms, strict=True)

    def project(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values [tokens, heads, dim] of `x` [tokens, hidden], turned to their positions."""
        heads = self._qkv(x).view(len(x), -1, self._dim)
        turning, v = torch.split(heads, [self._heads + self._kv_heads, self._kv_heads], dim=1)
        if self._norms:
            q, k = torch.split(turning, [self._heads, self._kv_heads], dim=1)
            q_norm, k_norm = self._norms
            turning = torch.cat((rms_norm(q, q_norm, self._eps), rms_norm(k, k_norm, self._eps)), dim=1)
        q, k = torch.split(apply_rope(turning, *rope), [self._heads, self._kv_heads], dim=1)
        return q, k, v

    def pack(self) -> None:
        self._qkv.pack()
        self._output.pack()

    def attend(self, q: torch.Tensor, cache_layer: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Attend from `q` over the cache and project back -> [tokens, hidden]."""
        return self._output(paged_attention(q, cache_layer, metadata, self._dim**-0.5).flatten(1))


class Mlp:
    """SwiGLU over this rank's part of the intermediate width."""

    def __init__(self, config: ModelConfig, new: NewTensor, tp: TensorParallel) -> None:
        self._width = config.intermediate_size // tp.size
        self._gate_up = Linear(config.hidden_size, 2 * self._width, config.mlp_bias, new)
        self._down = RowParallelLinear(config.intermediate_size, config.hidden_size, config.mlp_bias, new, tp)

    def named_weights(self) -> NamedTensors:
        yield from _parts(("gate_proj", "up_proj"), self._gate_up, [self._width, self._width])
        yield from _parts(("down_proj",), self._down)

    def pack(self) -> None:
        self._gate_up.pack()
        self._down.pack()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._down(silu_and_mul(self._gate_up(x)))


class Layer:
    """One decoder layer."""

    def __init__(self, config: ModelConfig, new: NewTensor, tp: TensorParallel) -> None:
        self.input_norm, self.attention = new(config.hidden_size), Attention(config, new, tp)
        self.mlp_norm, self.mlp = new(config.hidden_size), Mlp(config, new, tp)

    def named_weights(self) -> NamedTensors:
        yield "input_layernorm.weight", self.input_norm
        yield from _prefixed("self_attn", self.attention.named_weights())
        yield "post_attention_layernorm.weight", self.mlp_norm
        yield from _prefixed("mlp", self.mlp.named_weights())


class LlamaModel:
    """One rank's decoder for contexts of up to `max_positions`.

    Its weights are whatever memory held, until something fills `named_weights` and calls `pack_weights`.
    """

    def __init__(
        self, config: ModelConfig, tp: TensorParallel, dtype: torch.dtype, device: torch.device, max_positions: int
    ) -> None:
        new = partial(torch.empty, dtype=dtype, device=device)
        self.dtype = dtype
        self._eps = config.rms_norm_eps
        self._rope = RopeTable(config.rope, config.head_dim, max_positions, device)
        self._embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, new, tp)
        self._layers = [Layer(config, new, tp) for _ in range(config.num_layers)]
        self._norm = new(config.hidden_size)
        self._tied = config.tie_word_embeddings
        head_weight = self._embedding.weight if self._tied else torch.empty_like(self._embedding.weight)
        self._head = VocabParallelHead(config.vocab_size, head_weight, tp)

    def named_weights(self) -> NamedTensors:
        """Every weight's Hugging Face name and this rank's part of it, as a view to be filled."""
        yield "model.embed_tokens.weight", self._embedding.weight
        for index, layer in enumerate(self._layers):
            yield from _prefixed(f"model.layers.{index}", layer.named_weights())
        yield "model.norm.weight", self._norm
        if not self._tied:
            yield "lm_head.weight", self._head.weight

    def pack_weights(self) -> None:
        """Bring the filled weights into the form they are used in; `named_weights` means nothing from then on."""
        for layer in self._layers:
            layer.attention.pack()
            layer.mlp.pack()
        self._head.pack()

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: Sequence[torch.Tensor],
        metadata: AttentionMetadata,
        slot_mapping: torch.Tensor,
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Run packed tokens and write their KV; returns the normalised hidden states [tokens, hidden].

        `token_ids`, `positions` and `slot_mapping` (page * page_size + offset) are int64 [tokens]; `kv_cache` is one
        tensor [2, pages, kv_heads, page_size, dim] a layer. `on_layer(i)` is called once layer i's KV is written.
        """
        rope = self._rope.at(positions)
        residual = self._embedding(token_ids)
        normed = rms_norm(residual, self._layers[0].input_norm, self._eps)
        for index, (layer, cache_layer) in enumerate(zip(self._layers, kv_cache, strict=True)):
            q, k, v = layer.attention.project(normed, rope)
            write_kv(cache_layer, k, v, slot_mapping)
            if on_layer:
                on_layer(index)
            attended = layer.attention.attend(q, cache_layer, metadata)
            normed, residual = add_rms_norm(attended, residual, layer.mlp_norm, self._eps)
            normed, residual = add_rms_norm(layer.mlp(normed), residual, self._norm_after(index), self._eps)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the whole vocabulary [rows, vocab] float32, on every rank, for rows of `forward`'s result."""
        return self._head(hidden)

    def _norm_after(self, index: int) -> torch.Tensor:
        return self._layers[index + 1].input_norm if index + 1 < len(self._layers) else self._norm


def _prefixed(prefix: str, weights: NamedTensors) -> NamedTensors:
    for name, tensor in weights:
        yield f"{prefix}.{name}", tensor


def _parts(names: Sequence[str], fused: Linear, widths: list[int] | None = None) -> NamedTensors:
    """Weights and biases of the projections `names`, whose `widths` of output rows are fused into one."""
    widths = widths or [len(fused.weight)]
    for name, part in zip(names, torch.split(fused.weight, widths), strict=True):
        yield f"{name}.weight", part
    if fused.bias is not None:
        for name, part in zip(names, torch.split(fused.bias, widths), strict=True):
            yield f"{name}.bias", part
