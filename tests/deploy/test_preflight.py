"""What cannot run is told before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splitserve.cluster.errors import StartupError
from splitserve.cluster.rank_spec import RankSpec
from splitserve.cluster.topology import Topology
from splitserve.deploy.cpu_check import check_cpu
from splitserve.deploy.gpu_check import check_gpu
from splitserve.deploy.preflight import check_runnable
from splitserve.models.config import ModelConfig
from splitserve.models.resolve import load_model_config
from tests.deploy.test_plan import plan_text

V2_LITE = load_model_config("deepseek-v2-lite")
ONE_GPU = {
    "hosts": {"gpus": 1},
    "model": {"dtype": "bfloat16"},
    "colocated": True,
    "decode": {"device": "cuda", "kv_memory": "8GiB"},
}


@pytest.fixture(scope="module")
def smollm2() -> ModelConfig:
    return load_model_config("smollm2-135m-instruct")


def test_head_sizes_without_tiles(tmp_path: Path, smollm2: ModelConfig) -> None:
    check_runnable(plan_text(tmp_path, ONE_GPU, V2_LITE))
    check_runnable(plan_text(tmp_path, ONE_GPU, smollm2))
    with pytest.raises(StartupError, match="no tiles for heads of 80; expected powers of 2"):
        check_runnable(plan_text(tmp_path, ONE_GPU, replace(smollm2, head_dim=80)))
    assert V2_LITE.mla is not None
    odd = replace(V2_LITE, mla=replace(V2_LITE.mla, kv_lora_rank=384))
    with pytest.raises(StartupError, match=r"no tiles for heads of 384 \+ 64"):
        check_runnable(plan_text(tmp_path, ONE_GPU, odd))
    check_runnable(plan_text(tmp_path, {"decode": {"kv_memory": "8GiB"}}, odd))


def test_experts_in_float32_on_a_gpu(tmp_path: Path) -> None:
    raw = ONE_GPU | {"model": {"dtype": "float32"}, "hosts": {"gpus": 1, "gpu_memory": "800GB"}}
    with pytest.raises(StartupError, match=r"model\.dtype: experts in float32"):
        check_runnable(plan_text(tmp_path, raw, V2_LITE))


def test_deterministic_sums_over_gpus(tmp_path: Path, smollm2: ModelConfig) -> None:
    decode = {"device": "cuda", "kv_memory": "8GiB", "layout": {"tp": 3}}
    raw = ONE_GPU | {"hosts": {"gpus": 3}, "model": {"dtype": "bfloat16", "deterministic": True}, "decode": decode}
    with pytest.raises(StartupError, match=r"model\.deterministic: .* use tp: 1"):
        check_runnable(plan_text(tmp_path, raw, smollm2))


class FakeGpu:
    """A GPU of `total` bytes, of which `free` are free."""

    def __init__(self, patch: pytest.MonkeyPatch, capability: tuple[int, int], free: int, total: int) -> None:
        self.fraction = 0.0
        patch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of a test")
        patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
        patch.setattr(torch.cuda, "set_per_process_memory_fraction", self._reserve)

    def _reserve(self, fraction: float, device: torch.device) -> None:
        self.fraction = fraction


def rank(kv_memory: str, fraction: float = 1.0) -> RankSpec:
    decode = {"device": "cuda", "kv_memory": kv_memory, "gpu_fraction": fraction}
    raw = {"name": "t", "model": {"path": "m", "dtype": "bfloat16"}, "colocated": True, "decode": decode}
    return RankSpec(Topology.model_validate(raw), "colocated", 0, 0, 0, "cuda:0", "127.0.0.1", "1")


def test_a_gpu_too_old(monkeypatch: pytest.MonkeyPatch, smollm2: ModelConfig) -> None:
    FakeGpu(monkeypatch, (8, 0), 80 * 10**9, 80 * 10**9)
    with pytest.raises(StartupError, match=r"cuda:0 is a GPU of a test of compute capability 8\.0; kernels need 9\.0"):
        check_gpu(rank("1GiB"), smollm2)


def test_a_gpu_without_room(monkeypatch: pytest.MonkeyPatch, smollm2: ModelConfig) -> None:
    gpu = FakeGpu(monkeypatch, (9, 0), 40 * 10**9, 80 * 10**9)
    check_gpu(rank("30GiB"), smollm2)
    assert gpu.fraction == 1.0
    check_gpu(rank("10GiB", 0.25), smollm2)
    assert gpu.fraction == 0.25
    with pytest.raises(
        StartupError, match=r"decode.kv_memory: 257 MiB of weights and 40 GiB of KV do not fit on cuda:0"
    ):
        check_gpu(rank("40GiB"), smollm2)
    with pytest.raises(StartupError, match=r"a share of 18\.6 GiB"):
        check_gpu(rank("20GiB", 0.25), smollm2)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 576])
def test_this_processor_keeps_rows_apart(head_dim: int, caplog: pytest.LogCaptureFixture) -> None:
    check_cpu(head_dim)
    assert not caplog.records


@pytest.mark.parametrize("rows", [8, 32])
def test_a_processor_that_does_not_is_told_of(
    rows: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    product = torch.bmm

    def other_path(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        found = product(left, right)
        return found * (1 + 2**-22) if left.shape[1] == rows else found

    monkeypatch.setattr(torch, "bmm", other_path)
    check_cpu(64)
    assert "a float32 row's bits depend on its neighbours" in caplog.text
