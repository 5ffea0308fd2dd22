"""All GPU benchmarks, one after the other: `make gpu-bench`. Half an hour on two H100s, which the last two need."""

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
    "benchmarks.gpu_kv",
    "benchmarks.gpu_split",
)
for module in MODULES:
    subprocess.run([sys.executable, "-m", module], check=True)
