"""All GPU benchmarks, one after the other: `make gpu-bench`. A quarter of an hour on one H100."""

from __future__ import annotations

import subprocess
import sys

MODULES = (
    "benchmarks.gpu_start",
    "benchmarks.gpu_decode",
    "benchmarks.gpu_prefill",
    "benchmarks.gpu_serve",
    "benchmarks.gpu_sameness",
    "benchmarks.kernels.moe_experts",
    "benchmarks.kernels.decode_attention",
    "benchmarks.kernels.prefill_attention",
    "benchmarks.kernels.pointwise",
    "benchmarks.kernels.sampling",
)
for module in MODULES:
    subprocess.run([sys.executable, "-m", module], check=True)
