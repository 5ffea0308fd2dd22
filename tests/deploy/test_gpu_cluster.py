"""A cluster of real processes that share one GPU: prefill and decode, KV through the host."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.deploy.clusters import free_port, succeed

pytestmark = pytest.mark.gpu

TOPOLOGY = """
name: {name}
model: {{path: {model}, context: 1024, dtype: bfloat16}}
hosts: {{gpus: 1}}
router: {{grpc: "127.0.0.1:{port}"}}
prefill: {{device: cuda, gpu_fraction: 0.4, kv_memory: 64MiB}}
decode: {{device: cuda, gpu_fraction: 0.6, kv_memory: 64MiB, slots: 32}}
kv_transfer: {{staging: 4MiB}}
"""


def test_two_workers_share_a_gpu(tiny_model: Path, tmp_path: Path) -> None:
    name, file, figures = f"test-gpu-{os.getpid()}", tmp_path / "t.yaml", tmp_path / "figures.json"
    file.write_text(TOPOLOGY.format(name=name, model=tiny_model, port=free_port()))
    succeed("up", file, timeout_s=180)
    try:
        status = succeed("status", name)
        assert "prefill/0/0" in status
        assert "decode/0/0" in status
        ask = ("generate", "--cluster", name, "--text", "The quick brown fox", "--max-tokens", 24)
        alone = succeed(*ask)
        load = (
            "--requests",
            48,
            "--concurrency",
            32,
            "--prompt-tokens",
            "uniform:1:300",
            "--output-tokens",
            "uniform:1:60",
        )
        succeed("bench", "--cluster", name, *load, "--json", figures, timeout_s=120)
        assert json.loads(figures.read_text())["summary"]["errors"] == {}
        assert succeed(*ask) == alone
    finally:
        succeed("down", name)
