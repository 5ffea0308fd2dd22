"""Clusters of real processes on GPUs: prefill and decode on one, or on one each, and every way that KV can take."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from splitserve.client import Client
from tests.deploy.clusters import away_s, state_of, succeed
from tests.deploy.load import Load
from tests.ports import free_port

pytestmark = pytest.mark.gpu

TOPOLOGY = """
name: {name}
model: {{path: {model}, context: 1024, dtype: bfloat16}}
hosts: {{gpus: {gpus}}}
router: {{grpc: "127.0.0.1:{port}"}}
prefill: {{device: cuda, gpu_fraction: {prefill_fraction}, kv_memory: 64MiB}}
decode: {{device: cuda, gpu_fraction: {decode_fraction}, kv_memory: 64MiB, slots: 32}}
kv_transfer: {{staging: 4MiB, transport: {transport}}}
"""
FRACTIONS = ("prefill_fraction", "decode_fraction")
LOAD = ("--requests", 48, "--concurrency", 32, "--prompt-tokens", "uniform:1:300", "--output-tokens", "uniform:1:60")


@pytest.mark.parametrize("transport", ["cuda_ipc", "shm", "tcp"])
@pytest.mark.parametrize("gpus", [1, 2])
def test_two_workers(gpus: int, transport: str, tiny_model: Path, tmp_path: Path) -> None:
    if gpus > torch.cuda.device_count():
        pytest.skip("one GPU only")
    name, file, figures = f"test-gpu-{os.getpid()}", tmp_path / "t.yaml", tmp_path / "figures.json"
    fractions = {"prefill_fraction": 0.4, "decode_fraction": 0.6} if gpus == 1 else dict.fromkeys(FRACTIONS, 1)
    file.write_text(
        TOPOLOGY.format(name=name, model=tiny_model, port=free_port(), gpus=gpus, transport=transport, **fractions)
    )
    succeed("up", file, timeout_s=180)
    try:
        status = succeed("status", name)
        assert "prefill/0/0" in status
        assert "decode/0/0" in status
        assert f"KV transfer: {transport}" in status
        ask = ("generate", "--cluster", name, "--text", "The quick brown fox", "--max-tokens", 24)
        alone = succeed(*ask)
        succeed("bench", "--cluster", name, *LOAD, "--json", figures, timeout_s=120)
        assert json.loads(figures.read_text())["runs"][0]["summary"]["errors"] == {}
        assert succeed(*ask) == alone
    finally:
        succeed("down", name)


COLOCATED = """
name: {name}
model: {{path: {model}, context: 1024, dtype: float32}}
hosts: {{gpus: {tp}}}
router: {{grpc: "127.0.0.1:{port}"}}
colocated: true
decode: {{device: cuda, kv_memory: 64MiB, slots: 32, layout: {{tp: {tp}}}}}
"""


def test_tensor_parallel_over_nccl(tiny_model: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    answers = []
    for tp in (1, 2):
        name, file = f"test-gpu-tp{tp}-{os.getpid()}", tmp_path / "t.yaml"
        file.write_text(COLOCATED.format(name=name, model=tiny_model, port=free_port(), tp=tp))
        succeed("up", file, timeout_s=180)
        try:
            ask = ("generate", "--cluster", name, "--max-tokens", 24, "--text")
            answers.append([succeed(*ask, text) for text in ("The quick brown fox", "A", "import os\n" * 60)])
            with Client(state_of(name).endpoints) as client:
                found = client.generate("A", n=4, temperature=1.0, regex="(ab|cd){20}", max_tokens=80).result()
            assert all(re.fullmatch("(ab|cd){20}", sample.text) for sample in found.samples)
            answers[-1] += [sample.text for sample in found.samples]
        finally:
            succeed("down", name)
    assert answers[0] == answers[1]


FOUR = """
name: {name}
model: {{path: {model}, context: 1024, dtype: bfloat16}}
hosts: {{gpus: 1}}
router: {{grpc: "127.0.0.1:{port}"}}
prefill: {{device: cuda, replicas: 2, gpu_fraction: 0.25, kv_memory: 64MiB}}
decode: {{device: cuda, replicas: 2, gpu_fraction: 0.25, kv_memory: 64MiB, slots: 8}}
kv_transfer: {{staging: 4MiB}}
"""


def test_switch(tiny_model: Path, tmp_path: Path) -> None:
    """Under load, both ways: a worker has its other role within 5 s, and every answer is that of before."""
    name, file = f"test-gpu-switch-{os.getpid()}", tmp_path / "t.yaml"
    file.write_text(FOUR.format(name=name, model=tiny_model, port=free_port()))
    succeed("up", file, timeout_s=180)
    try:
        with Load(state_of(name).endpoints) as load:
            for worker, role in (("decode/1/0", "prefill"), ("decode/1/0", "decode"), ("prefill/0/0", "decode")):
                succeed("switch", worker, role, "--cluster", name)
                assert away_s(name, worker, role) < 5.0
                load.pass_by()
    finally:
        succeed("down", name)
