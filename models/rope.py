"""Angles of the rotary embedding, plain or stretched for longer contexts."""

from __future__ import annotations

import math

import torch

from splitserve.cluster.errors import ModelLoadError
from splitserve.models.config import LinearRope, Llama3Rope, RopeConfig


class RopeTable:
    """Cosines and sines of every position below `max_positions`, float32, for heads of `dim`."""

    def __init__(self, config: RopeConfig, dim: int, max_positions: int, device: torch.device) -> None:
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse_frequencies(config, dim))
        cos, sin = angles.cos(), angles.sin()
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
    raise ModelLoadError(f"config.json: rope scaling {type(config.scaling).__name__} cannot be run yet")


def _llama3(frequencies: torch.Tensor, scaling: Llama3Rope) -> torch.Tensor:
    """Llama 3.1: pairs that turn less than `low` times in the original context slow down by `factor`, those that turn
    more than `high` times stay, and a ramp joins the two."""
    waves = scaling.original_max_position * frequencies / (2 * math.pi)
    kept = (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies
