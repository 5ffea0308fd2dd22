"""All CPU benchmarks, one after the other: `make bench`. Half an hour on 2 cores; leave the machine alone meanwhile."""

from __future__ import annotations

import subprocess
import sys

for module in ("benchmarks.cpu_cluster", "benchmarks.router", "benchmarks.conversations", "benchmarks.kv_host"):
    subprocess.run([sys.executable, "-m", module], check=True)
