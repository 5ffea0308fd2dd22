"""All GPU benchmarks, one after the other: `make gpu-bench`. Ten minutes on one H100."""

from __future__ import annotations

import subprocess
import sys

for module in (
    "benchmarks.gpu_decode",
    "benchmarks.kernels.moe_experts",
    "benchmarks.kernels.decode_attention",
    "benchmarks.kernels.sampling",
):
    subprocess.run([sys.executable, "-m", module], check=True)
