"""Numbers of the host's on a device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(numbers: Sequence[int] | Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """int64 of the same shape. `torch.tensor(numbers, device=device)` would wait until a GPU has done all it has to."""
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
