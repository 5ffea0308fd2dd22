"""Angles of the rotary embedding, plain or stretched for longer contexts."""

from __future__ import annotations

import math

import torch

from splitserve.models.config import LinearRope, Llama3Rope, RopeConfig, YarnRope


class RopeTable:
    """Cosines and sines of every position below `max_positions`, float32, for heads of `dim`."""

    def __init__(self, config: RopeConfig, dim: int, max_positions: int, device: torch.device) -> None:
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse_frequencies(config, dim))
        factor = _yarn_attention_factor(config.scaling) if isinstance(config.scaling, YarnRope) else 1.0
        cos, sin = angles.cos() * factor, angles.sin() * factor
        self._cos = torch.cat((cos, cos), dim=-1).to(device)
        self._sin = torch.cat((-sin, sin), dim=-1).to(device)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [tokens, 1, dim] for `positions` [tokens], in the form `apply_rope` takes."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def inverse_frequencies(config: RopeConfig, dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions, float32 [dim / 2]: theta^(-2i / dim), then scaled."""
    frequencies = 1.0 / config.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    match config.scaling:
        case None:
            return frequencies
        case LinearRope(factor):
            return frequencies / factor
        case Llama3Rope():
            return _llama3(frequencies, config.scaling)
        case YarnRope():
            return _yarn(frequencies, config.scaling, config.theta, dim)


def softmax_scale(config: RopeConfig, head_dim: int) -> float:
    """What scores are multiplied by: 1 / sqrt(head_dim), and for DeepSeek's YaRN its correction of temperature."""
    scaling, scale = config.scaling, 1 / math.sqrt(head_dim)
    if isinstance(scaling, YarnRope) and scaling.mscale_all_dim:
        scale *= _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def _llama3(frequencies: torch.Tensor, scaling: Llama3Rope) -> torch.Tensor:
    """Llama 3.1: pairs that turn less than `low` times in the original context slow down by `factor`, those that turn
    more than `high` times stay, and a ramp joins the two."""
    waves = scaling.original_max_position * frequencies / (2 * math.pi)
    kept = (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: torch.Tensor, scaling: YarnRope, theta: float, dim: int) -> torch.Tensor:
    """YaRN: pairs that turn more than `beta_fast` times in the original context stay, those that turn less than
    `beta_slow` times slow down by `factor`, and a ramp over whole pairs joins the two."""

    def pair_that_turns(times: float) -> float:
        return dim * math.log(scaling.original_max_position / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - first) / max(last - first, 0.001)
    slowed = ramp.clamp(0, 1)
    return frequencies / scaling.factor * slowed + frequencies * (1 - slowed)


def _yarn_attention_factor(scaling: YarnRope) -> float:
    """What cosines and sines are multiplied by."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
