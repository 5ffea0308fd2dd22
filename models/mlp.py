"""SwiGLU feed-forward layers, dense and of experts."""

from __future__ import annotations

import torch

from splitserve.kernels import matmul
from splitserve.kernels.moe_experts import Experts, routed_experts, routed_terms
from splitserve.kernels.moe_routing import Routing, route
from splitserve.kernels.moe_tiles import expert_tiles
from splitserve.kernels.rms_norm import Terms
from splitserve.kernels.silu_and_mul import silu_and_mul
from splitserve.models.attention import Sequences
from splitserve.models.config import ModelConfig, MoeConfig
from splitserve.models.layers import (
    Linear,
    NamedTensors,
    NewTensor,
    RowParallelLinear,
    SingleRank,
    TensorParallel,
    linear,
    pack,
    parts,
    prefixed,
)


class Mlp:
    """SwiGLU over this rank's part of the intermediate `width`."""

    def __init__(self, config: ModelConfig, width: int, new: NewTensor, tp: TensorParallel) -> None:
        self._width = width // tp.size
        self._gate_up = Linear(config.hidden_size, 2 * self._width, config.mlp_bias, new)
        self._down = RowParallelLinear(width, config.hidden_size, config.mlp_bias, new, tp)

    def named_weights(self) -> NamedTensors:
        yield from parts(("gate_proj", "up_proj"), self._gate_up, [self._width, self._width])
        yield from parts(("down_proj",), self._down)

    def pack(self, deterministic: bool) -> None:
        self._gate_up.pack(deterministic)
        self._down.pack(deterministic)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate on up [2 * width, hidden] and down [hidden, width]."""
        return self._gate_up.weight, self._down.weight

    def __call__(self, x: torch.Tensor, sequences: Sequences) -> torch.Tensor | Terms:
        return self._down.terms(silu_and_mul(self._gate_up(x)))


class MixtureOfExperts:
    """Routed experts, cut over the ranks, and shared ones, whole on each.

    Every rank routes all rows, runs its own experts on those that chose them, and the sum over ranks is the result.
    """

    def __init__(self, config: ModelConfig, moe: MoeConfig, new: NewTensor, tp: TensorParallel) -> None:
        self._routing = Routing(
            moe.top_k, moe.scoring, moe.num_groups, moe.top_groups, moe.normalise, moe.routed_scaling_factor
        )
        self._tp, self._width = tp, moe.intermediate_size
        self._num_shared = moe.num_shared_experts
        local = moe.num_experts // tp.size
        self._experts = range(tp.rank * local, (tp.rank + 1) * local)
        self._gate = new(moe.num_experts, config.hidden_size)
        self._bias = new(moe.num_experts, dtype=torch.float32) if moe.router_bias else None
        self._gate_up = new(local, 2 * self._width, config.hidden_size)
        self._down = new(local, config.hidden_size, self._width)
        shared = moe.num_shared_experts * moe.intermediate_size
        self._shared = Mlp(config, shared, new, SingleRank()) if shared else None

    def named_weights(self) -> NamedTensors:
        yield "gate.weight", self._gate
        if self._bias is not None:
            yield "gate.e_score_correction_bias", self._bias
        yield "experts.gate_proj.weight", self._gate_up[:, : self._width]
        yield "experts.up_proj.weight", self._gate_up[:, self._width :]
        yield "experts.down_proj.weight", self._down
        if self._shared is not None:
            yield from prefixed("shared_experts", self._shared.named_weights())

    def pack(self, deterministic: bool) -> None:
        self._fixed = deterministic
        self._shared_choices = self._append_shared() if self._gate.is_cuda and self._tp.size == 1 else 0
        if self._shared is not None:
            self._shared.pack(deterministic)
        if self._gate.is_cuda:
            return
        self._gate = pack(self._gate.float())
        self._packed = [(pack(gate_up), pack(down)) for gate_up, down in zip(self._gate_up, self._down, strict=True)]
        del self._gate_up, self._down

    def __call__(self, x: torch.Tensor, sequences: Sequences) -> torch.Tensor | Terms:
        """[tokens, hidden] -> [tokens, hidden]. A token's parts are added in the order of its choices."""
        if x.is_cuda:
            logits = _gate_scores(x, self._gate, self._fixed)
            weights, chosen = route(logits, self._bias, self._routing, self._shared_choices)
            experts = Experts(self._gate_up, self._down, self._experts.start, self._shared_choices)
            tiles = expert_tiles(len(x), chosen.shape[1], len(experts), self._fixed)
            routing = x, weights, chosen, experts, sequences.live_rows(len(x))
            if self._tp.size == 1:
                return routed_terms(*routing, tiles=tiles)
            routed = routed_experts(*routing, tiles=tiles)
        else:
            routed = self._on_cpu(x)
        routed = self._tp.all_reduce(routed)
        if self._shared is None:
            return routed
        shared = self._shared(x, sequences)
        return routed + (shared.sum(x.dtype) if isinstance(shared, Terms) else shared)

    def _append_shared(self) -> int:
        """Make shared experts of routed ones that every token chooses, with weight 1; returns how many."""
        if self._shared is None:
            return 0
        gate_up, down = self._shared.weights()
        by_expert = gate_up.view(2, self._num_shared, self._width, -1).transpose(0, 1).flatten(1, 2)
        self._gate_up = torch.cat((self._gate_up, by_expert))
        self._down = torch.cat((self._down, down.view(len(down), self._num_shared, -1).transpose(0, 1)))
        self._shared = None
        return self._num_shared

    def _on_cpu(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = route(linear(x.float(), self._gate), self._bias, self._routing)
        mixed = x.new_zeros(*chosen.shape, x.shape[1])
        for expert, (gate_up, down) in zip(self._experts, self._packed, strict=True):
            rows, places = torch.where(chosen == expert)
            if len(rows):
                mixed[rows, places] = linear(silu_and_mul(linear(x[rows], gate_up)), down)
        total = torch.zeros_like(x, dtype=torch.float32)
        for place in range(chosen.shape[1]):
            total += mixed[:, place].float() * weights[:, place, None]
        return total.to(x.dtype)


def _gate_scores(x: torch.Tensor, gate: torch.Tensor, fixed: bool) -> torch.Tensor:
    """x @ gate.T in float32, or the terms of it. Products of two bfloat16 numbers are exact in float32."""
    if fixed or len(x) <= matmul.FEW_ROWS:
        return matmul.product_terms(x, gate, matmul.GATE, torch.float32)
    return x @ gate.T if x.dtype == torch.float32 else torch.mm(x, gate.T, out_dtype=torch.float32)
