"""What launchers need to know of the device."""

from __future__ import annotations

import torch
import triton

INTERPRETING = bool(triton.knobs.runtime.interpret)


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 2 for a CPU, where the interpreter runs kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
