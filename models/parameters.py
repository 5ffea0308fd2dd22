"""Every weight of a model by name and shape, and what a rank keeps of it. Imports no torch.

Routed experts of a layer are listed as one stacked weight [experts, out, in].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import ceil, prod

from splitserve.models.config import MlaConfig, ModelConfig, MoeConfig


class Shard(Enum):
    """How a weight is cut over the ranks of a replica."""

    WHOLE = "whole on every rank"
    VOCAB = "rows over TP, the vocabulary padded to a multiple of it"
    ROWS = "output rows over TP"
    COLUMNS = "input columns over TP"
    KV_HEADS = "rows of whole KV heads over TP, heads repeated where ranks outnumber them"
    EXPERTS = "first dimension over EP"


@dataclass(frozen=True)
class Parameter:
    """One weight. `linear` weights are those that block-scaled fp8 checkpoints quantise."""

    name: str
    shape: tuple[int, ...]
    shard: Shard = Shard.WHOLE
    linear: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """All weights of the main model, under their Hugging Face names; without multi-token-prediction layers."""
    embedding = (config.vocab_size, config.hidden_size)
    yield Parameter("model.embed_tokens.weight", embedding, Shard.VOCAB)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        yield Parameter(f"{prefix}.input_layernorm.weight", (config.hidden_size,))
        if config.mla:
            yield from _latent_attention(f"{prefix}.self_attn", config, config.mla)
        else:
            yield from _attention(f"{prefix}.self_attn", config)
        yield Parameter(f"{prefix}.post_attention_layernorm.weight", (config.hidden_size,))
        if config.moe and layer >= config.moe.first_k_dense:
            yield from _experts(f"{prefix}.mlp", config, config.moe)
        else:
            yield from _mlp(f"{prefix}.mlp", config)
    yield Parameter("model.norm.weight", (config.hidden_size,))
    if not config.tie_word_embeddings:
        yield Parameter("lm_head.weight", embedding, Shard.VOCAB)


def total_parameters(config: ModelConfig) -> int:
    """Number of weights of the main model."""
    return sum(parameter.numel for parameter in parameters(config))


def weight_bytes(config: ModelConfig, tp: int, ep: int, dtype_bytes: int) -> int:
    """Bytes of weights on one rank. Heads, widths and experts must divide over `tp` and `ep`.

    Linear weights of an fp8 checkpoint take one byte each and one float32 scale per block, whatever `dtype_bytes`.
    """
    total = 0
    for parameter in parameters(config):
        shape = local_shape(parameter, config, tp, ep)
        if config.fp8_block and parameter.linear:
            blocks = prod(shape[:-2]) * ceil(shape[-2] / config.fp8_block[0]) * ceil(shape[-1] / config.fp8_block[1])
            total += prod(shape) + 4 * blocks
        else:
            total += prod(shape) * dtype_bytes
    return total


def local_shape(parameter: Parameter, config: ModelConfig, tp: int, ep: int) -> tuple[int, ...]:
    """Shape of what one rank keeps of `parameter`; the same on every rank."""
    first, rest = parameter.shape[0], parameter.shape[1:]
    match parameter.shard:
        case Shard.WHOLE:
            return parameter.shape
        case Shard.VOCAB:
            return (ceil(first / tp), *rest)
        case Shard.ROWS:
            return (first // tp, *rest)
        case Shard.COLUMNS:
            return (first, parameter.shape[1] // tp)
        case Shard.KV_HEADS:
            return (max(1, config.num_kv_heads // tp) * config.head_dim, *rest)
        case Shard.EXPERTS:
            return (first // ep, *rest)


def _linear(name: str, shape: tuple[int, ...], shard: Shard, bias: bool = False) -> Iterator[Parameter]:
    """Weight [out, in] and, with `bias`, the bias [out], which columns over TP leave whole."""
    yield Parameter(f"{name}.weight", shape, shard, linear=True)
    if bias:
        yield Parameter(f"{name}.bias", shape[:1], Shard.WHOLE if shard is Shard.COLUMNS else shard)


def _attention(prefix: str, config: ModelConfig) -> Iterator[Parameter]:
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield from _linear(f"{prefix}.q_proj", (query, config.hidden_size), Shard.ROWS, config.qkv_bias)
    for name in ("k_proj", "v_proj"):
        yield from _linear(f"{prefix}.{name}", (kv, config.hidden_size), Shard.KV_HEADS, config.qkv_bias)
    yield from _linear(f"{prefix}.o_proj", (config.hidden_size, query), Shard.COLUMNS, config.output_bias)
    if config.qk_norm:
        yield Parameter(f"{prefix}.q_norm.weight", (config.head_dim,))
        yield Parameter(f"{prefix}.k_norm.weight", (config.head_dim,))


def _latent_attention(prefix: str, config: ModelConfig, mla: MlaConfig) -> Iterator[Parameter]:
    heads, hidden = config.num_heads, config.hidden_size
    if mla.q_lora_rank:
        yield from _linear(f"{prefix}.q_a_proj", (mla.q_lora_rank, hidden), Shard.WHOLE)
        yield Parameter(f"{prefix}.q_a_layernorm.weight", (mla.q_lora_rank,))
        yield from _linear(f"{prefix}.q_b_proj", (heads * config.head_dim, mla.q_lora_rank), Shard.ROWS)
    else:
        yield from _linear(f"{prefix}.q_proj", (heads * config.head_dim, hidden), Shard.ROWS)
    yield from _linear(f"{prefix}.kv_a_proj_with_mqa", (mla.latent_dim, hidden), Shard.WHOLE)
    yield Parameter(f"{prefix}.kv_a_layernorm.weight", (mla.kv_lora_rank,))
    expanded = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    yield from _linear(f"{prefix}.kv_b_proj", (expanded, mla.kv_lora_rank), Shard.ROWS)
    yield from _linear(f"{prefix}.o_proj", (hidden, heads * mla.v_head_dim), Shard.COLUMNS)


def _mlp(prefix: str, config: ModelConfig) -> Iterator[Parameter]:
    for name, shape in _swiglu_shapes(config.intermediate_size, config.hidden_size):
        shard = Shard.COLUMNS if name == "down_proj" else Shard.ROWS
        yield from _linear(f"{prefix}.{name}", shape, shard, config.mlp_bias)


def _experts(prefix: str, config: ModelConfig, moe: MoeConfig) -> Iterator[Parameter]:
    """Shared experts are whole on every rank, because each TP rank runs them on its own share of the rows."""
    hidden, wide = config.hidden_size, moe.intermediate_size
    yield Parameter(f"{prefix}.gate.weight", (moe.num_experts, hidden))
    if moe.router_bias:
        yield Parameter(f"{prefix}.gate.e_score_correction_bias", (moe.num_experts,))
    for name, (rows, columns) in _swiglu_shapes(wide, hidden):
        yield from _linear(f"{prefix}.experts.{name}", (moe.num_experts, rows, columns), Shard.EXPERTS)
    if moe.num_shared_experts:
        for name, shape in _swiglu_shapes(moe.num_shared_experts * wide, hidden):
            yield from _linear(f"{prefix}.shared_experts.{name}", shape, Shard.WHOLE)


def _swiglu_shapes(wide: int, hidden: int) -> list[tuple[str, tuple[int, int]]]:
    return [("gate_proj", (wide, hidden)), ("up_proj", (wide, hidden)), ("down_proj", (hidden, wide))]
