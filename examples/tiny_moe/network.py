"""A mixture of experts in DeepSeek-V3's shape (arXiv 2412.19437), to be trained: attention over latents, a first dense
layer, shared and routed experts, and one module that predicts the token after the next.

Parameters have the names of DeepSeek's checkpoints, but for a layer's experts, which are one tensor of each kind
(`checkpoint.py` takes them apart). All experts compute all tokens and the router's weights, mostly zeros, say what
counts: at this size that is faster than sorting tokens, and the same to the last term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Sizes, under the names of DeepSeek-V3's config.json. 7.9 million parameters by default."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 512
    moe_intermediate_size: int = 64
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    q_lora_rank: int = 96
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 1.5
    first_k_dense_replace: int = 1
    rope_theta: float = 10000.0
    max_position_embeddings: int = 1024


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, EPS).to(x.dtype)


def linear(width: int, out: int) -> nn.Linear:
    return nn.Linear(width, out, bias=False)


class LatentAttention(nn.Module):
    """Causal attention with queries and keys of low rank; a cache would keep `kv_lora_rank` numbers and one key."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        heads, head_dim = shape.num_attention_heads, shape.qk_nope_head_dim + shape.qk_rope_head_dim
        self.q_a_proj = linear(shape.hidden_size, shape.q_lora_rank)
        self.q_a_layernorm = RmsNorm(shape.q_lora_rank)
        self.q_b_proj = linear(shape.q_lora_rank, heads * head_dim)
        self.kv_a_proj_with_mqa = linear(shape.hidden_size, shape.kv_lora_rank + shape.qk_rope_head_dim)
        self.kv_a_layernorm = RmsNorm(shape.kv_lora_rank)
        self.kv_b_proj = linear(shape.kv_lora_rank, heads * (shape.qk_nope_head_dim + shape.v_head_dim))
        self.o_proj = linear(heads * shape.v_head_dim, shape.hidden_size)

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, hidden] -> the same; `angles` as `rotary_angles` makes them."""
        shape, heads = self.shape, self.shape.num_attention_heads
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (heads, -1)).transpose(1, 2)
        q_plain, q_turning = q.split([shape.qk_nope_head_dim, shape.qk_rope_head_dim], -1)
        latent, k_turning = self.kv_a_proj_with_mqa(x).split([shape.kv_lora_rank, shape.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1)).transpose(1, 2)
        k_plain, v = kv.split([shape.qk_nope_head_dim, shape.v_head_dim], -1)
        k_turned = turn(k_turning.unsqueeze(1), angles).expand(-1, heads, -1, -1)
        q, k = torch.cat((q_plain, turn(q_turning, angles)), -1), torch.cat((k_plain, k_turned), -1)
        # Values are padded to the width of keys: kernels for both alike are the fast ones.
        v = F.pad(v, (0, q.shape[-1] - shape.v_head_dim))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., : shape.v_head_dim]
        attended: torch.Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return attended


def rotary_angles(shape: Shape, tokens: int, device: torch.device) -> torch.Tensor:
    """[2, tokens, rope / 2] float32: cosines and sines of every position's angles."""
    half = torch.arange(0, shape.qk_rope_head_dim, 2, device=device).float() / shape.qk_rope_head_dim
    angles = torch.outer(torch.arange(tokens, device=device).float(), shape.rope_theta**-half)
    return torch.stack((angles.cos(), angles.sin()))


def turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn pairs of neighbours in the last dimension, the interleaved form of rotary embedding (arXiv 2104.09864)."""
    even, odd = x.float()[..., ::2], x.float()[..., 1::2]
    cos, sin = angles
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


class Mlp(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(hidden, width),
            linear(hidden, width),
            linear(width, hidden),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Gate(nn.Module):
    """Sigmoid scores; a bias that training balances takes part in the choice and not in the weight."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape.n_routed_experts, shape.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(shape.n_routed_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> weights [tokens, experts] float32, 0 for experts that are not chosen."""
        shape = self.shape
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight).sigmoid()
        merit = scores.detach() + self.get_buffer("e_score_correction_bias")
        grouped = merit.view(-1, shape.n_group, shape.n_routed_experts // shape.n_group)
        groups = grouped.topk(2, -1).values.sum(-1).topk(shape.topk_group, -1).indices
        outside = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=x.device).scatter(-1, groups, False)
        merit = grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)
        chosen = torch.zeros_like(scores).scatter(-1, merit.topk(shape.num_experts_per_tok, -1).indices, 1.0)
        weights = scores * chosen
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * shape.routed_scaling_factor


class Experts(nn.Module):
    """All routed experts of a layer, each a SwiGLU of `moe_intermediate_size`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        experts, width, hidden = shape.n_routed_experts, shape.moe_intermediate_size, shape.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden], [tokens, experts] -> [tokens, hidden]"""
        gate, up = F.linear(x, self.gate_proj.flatten(0, 1)), F.linear(x, self.up_proj.flatten(0, 1))
        act = (F.silu(gate) * up).view(*weights.shape, -1) * weights.to(gate.dtype).unsqueeze(-1)
        return F.linear(act.flatten(-2), self.down_proj.transpose(0, 1).flatten(1))


class MixtureOfExperts(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate, self.experts = Gate(shape), Experts(shape)
        self.shared_experts = Mlp(shape.hidden_size, shape.n_shared_experts * shape.moe_intermediate_size)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., hidden] -> the same, and how many tokens chose each expert [experts] float32."""
        flat = x.flatten(0, -2)
        weights = self.gate(flat)
        load = (weights.detach() > 0).sum(0).float()
        return self.shared_experts(x) + self.experts(flat, weights).view_as(x), load


class Layer(nn.Module):
    def __init__(self, shape: Shape, dense: bool) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = RmsNorm(shape.hidden_size), LatentAttention(shape)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size)
        self.mlp = Mlp(shape.hidden_size, shape.intermediate_size) if dense else MixtureOfExperts(shape)

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = x + self.self_attn(self.input_layernorm(x), angles)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, Mlp):
            return x + self.mlp(normed), None
        out, load = self.mlp(normed)
        return x + out, load


class MtpModule(Layer):
    """Multi-token prediction, depth one: from a position's hidden state and the token behind it, the token after that.

    The embedding and the head are the main model's.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, dense=False)
        self.enorm, self.hnorm = RmsNorm(shape.hidden_size), RmsNorm(shape.hidden_size)
        self.eh_proj = linear(2 * shape.hidden_size, shape.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RmsNorm(shape.hidden_size)})

    def predict(
        self, hidden: torch.Tensor, next_embeddings: torch.Tensor, angles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden` [batch, tokens, hidden] after the main model's last norm -> the same shape, ready for the head."""
        joined = torch.cat((self.enorm(next_embeddings), self.hnorm(hidden)), -1)
        out, load = self(self.eh_proj(joined), angles)
        return self.shared_head["norm"](out), load


class Output(NamedTuple):
    """`logits` [batch, tokens, vocab] of the next token; `mtp_logits` [batch, tokens - 1, vocab] of the one after it.

    `loads` [layers with experts, experts]: tokens that chose each expert, the MTP module's layer last.
    """

    logits: torch.Tensor
    mtp_logits: torch.Tensor
    loads: torch.Tensor


class TinyMoe(nn.Module):
    """The main model's layers and behind them, as the layer of that number, the MTP module."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        dense = [index < shape.first_k_dense_replace for index in range(shape.num_hidden_layers)]
        self.layers = nn.ModuleList([*(Layer(shape, each) for each in dense), MtpModule(shape)])
        self.norm = RmsNorm(shape.hidden_size)

    def initialise(self, seed: int) -> None:
        """Normal weights of 1/sqrt(fan in), those that add to the residual narrower by the number of additions."""
        generator = torch.Generator().manual_seed(seed)
        narrower = (2 * len(self.layers)) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter.shape[-1]
                std = 0.02 if "embed" in name else fan_in**-0.5
                if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                    std *= narrower
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def forward(self, tokens: torch.Tensor) -> Output:
        """`tokens` [batch, length] int64."""
        angles = rotary_angles(self.shape, tokens.shape[1], tokens.device)
        embedded = self.embed_tokens(tokens)
        hidden, loads = embedded, []
        *main, mtp = self.layers
        for layer in main:
            hidden, load = layer(hidden, angles)
            loads.append(load)
        hidden = self.norm(hidden)
        assert isinstance(mtp, MtpModule)
        ahead, load = mtp.predict(hidden[:, :-1], embedded[:, 1:], angles[:, :-1])
        loads.append(load)
        head = self.embed_tokens.weight
        counted = torch.stack([load for load in loads if load is not None])
        return Output(F.linear(hidden, head), F.linear(ahead, head), counted)
