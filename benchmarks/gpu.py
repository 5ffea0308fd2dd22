"""All GPU benchmarks, one after the other: `make gpu-bench`. Ten minutes on one H100."""

from __future__ import annotations

import subprocess
import sys

KERNELS = ("moe_experts", "decode_attention", "pointwise")
for module in ("benchmarks.gpu_decode", *(f"benchmarks.kernels.{name}" for name in KERNELS)):
    subprocess.run([sys.executable, "-m", module], check=True)
