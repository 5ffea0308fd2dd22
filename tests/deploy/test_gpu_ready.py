"""A GPU engine that says it is ready is: no request waits for a kernel to be compiled."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import triton

from splitserve.cluster.topology import Topology
from splitserve.deploy.bench.engine import EngineAlone
from splitserve.prefill_worker.runner import PrefillRunner
from tests.tiny_model import write_tiny_model, write_tiny_moe

pytestmark = pytest.mark.gpu

SHAPES = [(1, 1), (1, 5), (3, 100), (9, 60), (2, 700), (20, 900), (1, 2999), (5, 611), (7, 1000)]


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("write", [write_tiny_model, write_tiny_moe], ids=["dense", "latent-moe"])
def test_nothing_is_compiled_once_an_engine_is_ready(write: Any, graphs: bool, tmp_path: Path) -> None:
    """Not even for prompts too long for prefill's graphs, or by engines without any."""
    decode = {"device": "cuda", "kv_memory": "256MiB", "slots": 20, "capacities": (4,), "chunk_tokens": 4096}
    model = {"path": str(write(tmp_path)), "dtype": "bfloat16", "context": 4096}
    topology = {"name": "ready", "model": model, "colocated": True, "hosts": {"gpus": 1}, "decode": decode}
    with nullcontext() if graphs else patch.object(PrefillRunner, "_capture"):
        engine = EngineAlone(Topology.model_validate(topology))
    dice = random.Random(0)
    compiled: list[str] = []

    def compiling(*, repr: str, **_: Any) -> None:
        compiled.append(repr)

    with patch.object(triton.knobs.runtime, "jit_cache_hook", compiling):
        for prompts, tokens in SHAPES + [(dice.randint(1, 9), dice.randint(1, 1500)) for _ in range(30)]:
            engine.serve_s(prompts, tokens, 4)
    assert compiled == []
