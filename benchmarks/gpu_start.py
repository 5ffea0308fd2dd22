"""How long one engine takes from nothing to its first step on one GPU, with cold and with warm kernel caches.

    python -m benchmarks.gpu_start

DeepSeek-V2-Lite's shapes, random weights. `start` is all of it: the process, its imports, CUDA, weights and graphs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

from benchmarks.gpu_decode import TOPOLOGY
from benchmarks.rows import Figure, Row, write
from splitserve.cluster.topology import Topology
from splitserve.deploy.bench.engine import EngineAlone

CASE = "v2lite-bf16 capacities=16,64,128,256"
METRICS = (("start", "s"), ("ready", "s"), ("capture", "s"), ("graph memory", "MiB"))


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        for caches in ("cold", "warm"):
            child = [sys.executable, "-m", "benchmarks.gpu_start", "child"]
            environment = os.environ | {"TRITON_CACHE_DIR": cache}
            began = time.time()
            output = subprocess.run(child, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            ended, *figures = json.loads(output.splitlines()[-1])
            for (metric, unit), value in zip(METRICS, [ended - began, *figures], strict=True):
                case = f"{CASE}, {caches} caches"
                write([Row("graph", case, metric, unit, Figure.of([value]), "none", None, "lower")])


def child() -> None:
    engine = EngineAlone(Topology.model_validate(TOPOLOGY))
    assert engine.loop is not None
    print(json.dumps([time.time(), engine.ready_s, engine.loop.capture_s, engine.loop.memory_bytes / 2**20]))


if __name__ == "__main__":
    child() if sys.argv[1:] == ["child"] else main()
