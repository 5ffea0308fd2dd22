"""A GPU engine that says it is ready is: no request waits for a kernel to be compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import triton

from splitserve.cluster.topology import Topology
from splitserve.deploy.bench.engine import EngineAlone
from tests.tiny_model import write_tiny_model, write_tiny_moe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("write", [write_tiny_model, write_tiny_moe], ids=["dense", "latent-moe"])
def test_nothing_is_compiled_once_an_engine_is_ready(write: Any, tmp_path: Path) -> None:
    decode = {"device": "cuda", "kv_memory": "256MiB", "slots": 20, "capacities": (4,), "chunk_tokens": 1024}
    model = {"path": str(write(tmp_path)), "dtype": "bfloat16", "context": 1024}
    topology = {"name": "ready", "model": model, "colocated": True, "hosts": {"gpus": 1}, "decode": decode}
    engine = EngineAlone(Topology.model_validate(topology))
    compiled: list[str] = []

    def compiling(*, repr: str, **_: Any) -> None:
        compiled.append(repr)

    with patch.object(triton.knobs.runtime, "jit_cache_hook", compiling):
        for prompts, tokens in ((1, 1), (1, 5), (3, 100), (9, 60), (2, 700), (20, 900)):
            engine.serve_s(prompts, tokens, 4)
    assert compiled == []
