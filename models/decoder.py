"""A decoder-only model: embedding, layers of attention and feed-forward, norm and head. All architectures run here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from splitserve.kernels.rms_norm import add_rms_norm, rms_norm
from splitserve.models.attention import Attention, GroupedQueryAttention, Sequences
from splitserve.models.config import ModelConfig
from splitserve.models.latent_attention import LatentAttention
from splitserve.models.layers import (
    NamedTensors,
    NewTensor,
    TensorParallel,
    VocabParallelEmbedding,
    VocabParallelHead,
    prefixed,
)
from splitserve.models.mlp import MixtureOfExperts, Mlp
from splitserve.models.rope import RopeTable


class Layer:
    """Decoder layer number `index`."""

    def __init__(self, config: ModelConfig, index: int, new: NewTensor, tp: TensorParallel) -> None:
        self.input_norm, self.mlp_norm = new(config.hidden_size), new(config.hidden_size)
        self.attention: Attention
        if config.mla is None:
            self.attention = GroupedQueryAttention(config, new, tp)
        else:
            self.attention = LatentAttention(config, config.mla, new, tp)
        self.mlp: Mlp | MixtureOfExperts
        if config.moe is None or index < config.moe.first_k_dense:
            self.mlp = Mlp(config, config.intermediate_size, new, tp)
        else:
            self.mlp = MixtureOfExperts(config, config.moe, new, tp)

    def named_weights(self) -> NamedTensors:
        yield "input_layernorm.weight", self.input_norm
        yield from prefixed("self_attn", self.attention.named_weights())
        yield "post_attention_layernorm.weight", self.mlp_norm
        yield from prefixed("mlp", self.mlp.named_weights())


class Decoder:
    """One rank's model for contexts of up to `max_positions`.

    Its weights are whatever memory held, until something fills `named_weights` and calls `pack_weights`.
    """

    def __init__(
        self, config: ModelConfig, tp: TensorParallel, dtype: torch.dtype, device: torch.device, max_positions: int
    ) -> None:
        new = partial(torch.empty, dtype=dtype, device=device)
        self.dtype = dtype
        self._eps = config.rms_norm_eps
        self._rope = RopeTable(config.rope, config.rotary_dim, max_positions, device)
        self._embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, new, tp)
        self._layers = [Layer(config, index, new, tp) for index in range(config.num_layers)]
        self._norm = new(config.hidden_size)
        self._tied = config.tie_word_embeddings
        head_weight = self._embedding.weight if self._tied else torch.empty_like(self._embedding.weight)
        self._head = VocabParallelHead(config.vocab_size, head_weight, tp)

    def named_weights(self) -> NamedTensors:
        """Every weight's Hugging Face name and this rank's part of it, as a view to be filled."""
        yield "model.embed_tokens.weight", self._embedding.weight
        for index, layer in enumerate(self._layers):
            yield from prefixed(f"model.layers.{index}", layer.named_weights())
        yield "model.norm.weight", self._norm
        if not self._tied:
            yield "lm_head.weight", self._head.weight

    def pack_weights(self, deterministic: bool = False) -> None:
        """Bring the filled weights into the form they are used in; `named_weights` means nothing from then on.

        `deterministic`: on a GPU too, a row's bits do not depend on the others, their number, or its place.
        """
        self.deterministic = deterministic
        for layer in self._layers:
            layer.attention.pack(deterministic)
            layer.mlp.pack(deterministic)
        self._head.pack(deterministic)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: Sequence[torch.Tensor],
        sequences: Sequences,
        slot_mapping: torch.Tensor,
        on_layers: Callable[[range], None] | None = None,
    ) -> torch.Tensor:
        """Run packed tokens and write their KV; returns the normalised hidden states [tokens, hidden].

        `token_ids`, `positions` and `slot_mapping` (page * page_size + offset) are int64 [tokens]; `kv_cache` is one
        tensor [planes, pages, kv_heads, page_size, dim] a layer. `on_layers` is called when a range of
        layers has written its KV.
        """
        angles = self._rope.at(positions)
        residual = self._embedding(token_ids)
        normed = rms_norm(residual, self._layers[0].input_norm, self._eps)
        for index, (layer, cache_layer) in enumerate(zip(self._layers, kv_cache, strict=True)):
            q = layer.attention.project(normed, angles, cache_layer, slot_mapping, sequences)
            if on_layers:
                on_layers(range(index, index + 1))
            attended = layer.attention.attend(q, cache_layer, sequences)
            normed, residual = add_rms_norm(attended, residual, layer.mlp_norm, self._eps)
            normed, residual = add_rms_norm(layer.mlp(normed, sequences), residual, self._norm_after(index), self._eps)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the whole vocabulary [rows, vocab] float32, on every rank, for rows of `forward`'s result."""
        return self.narrow_logits(hidden).float()

    def narrow_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same in the model's dtype, as the head computes them."""
        return self._head(hidden)

    def _norm_after(self, index: int) -> torch.Tensor:
        return self._layers[index + 1].input_norm if index + 1 < len(self._layers) else self._norm
