"""Ranks that are killed and stopped under load: every request ends once, to the bit, and nothing is left of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Literal

import pytest
import torch

from splitserve.cluster.layout import KvLayout
from splitserve.cluster.segment_files import FOLDER, sweep
from tests.kv_transfer.chaos.conductor import Conductor
from tests.kv_transfer.chaos.report import Report, plan
from tests.kv_transfer.chaos.setup import Setup

CLUSTER = f"chaos{os.getpid()}"
MIB = 1 << 20
ON_CPU = {"source": ("cpu", "cpu"), "target": ("cpu", "cpu")}


@pytest.fixture(autouse=True)
def _clean_shared_memory() -> Iterator[None]:
    """Only what ranks that were killed left may be there at the end, for the next one's sweep."""
    yield
    sweep(CLUSTER)
    assert not list(FOLDER.glob(f"splitserve-{CLUSTER}-*"))


@pytest.fixture
def gpu_memory() -> Iterator[None]:
    """Comes back, all but what the driver may keep."""
    before = free_gpu_memory()
    yield
    deadline = time.monotonic() + 10
    while any(then - now >= 64 * MIB for then, now in zip(before, free_gpu_memory(), strict=True)):
        assert time.monotonic() < deadline, (before, free_gpu_memory())
        time.sleep(0.1)


def free_gpu_memory() -> list[int]:
    return [torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count())]


def on_gpus() -> dict[str, tuple[str, ...]]:
    """Two ranks a side, each on a GPU of its own where there are four; else a side shares one, or both sides do."""
    source, target = {1: ((0, 0), (0, 0)), 2: ((0, 0), (1, 1))}.get(torch.cuda.device_count(), ((0, 1), (2, 3)))
    return {"source": tuple(f"cuda:{n}" for n in source), "target": tuple(f"cuda:{n}" for n in target)}


def check(report: Report, faults: int, longest_pass_s: float) -> None:
    print(f"\n{report}")
    assert sum(report.faults.values()) == len(report.disturbed) == faults
    assert min(report.disturbed) > 0
    assert min(report.killed_mid_copy[side] for side in ("source", "target")) > 0
    assert report.longest_pass["target"] < longest_pass_s
    assert any(member.state and member.state.when_warm for member in report.members)
    for member in report.members:
        assert member.state is not None
        for early, late in zip(member.state.when_warm or (), member.state.threads_and_files, strict=False):
            assert late <= early + 8 + 4 * member.lost_peers, "a way to one that is gone is kept for a minute"


def run(setup: Setup, faults: int, gap_s: tuple[float, float], requests: int, seed: int) -> Report:
    conductor = Conductor(setup, plan(seed, faults, gap_s), requests, seed)
    try:
        return conductor.run()
    finally:
        conductor.close()


@pytest.mark.parametrize("seed", [1])
@pytest.mark.parametrize("transport", ["shm", "tcp", "nccl"])
def test_on_the_host(transport: Literal["shm", "tcp", "nccl"], seed: int) -> None:
    """Links are of sockets here."""
    setup = Setup(
        cluster=CLUSTER,
        transport=transport,
        devices=ON_CPU,
        source=KvLayout(1, 4, 2, 4, 64, 16, "float32"),
        target=KvLayout(1, 4, 2, 4, 64, 8, "float32"),
        source_pages=256,
        target_pages=1024,
        tokens=(16, 512),
        staging_bytes=64 * MIB,
        lease_s=1.0,  # most stops outlast a window's quarantine, and end when others have it
    )
    report = run(setup, faults=10, gap_s=(0.5, 1.5), requests=48, seed=seed)
    check(report, faults=10, longest_pass_s=0.5)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("gpu_memory")
@pytest.mark.parametrize("seed", [1])
@pytest.mark.parametrize(("transport", "faults"), [("cuda_ipc", 50), ("nccl", 50), ("shm", 20)])
def test_between_gpus(transport: Literal["cuda_ipc", "nccl", "shm"], faults: int, seed: int) -> None:
    if transport == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL joins no GPU with itself: this needs 2 GPUs; there is 1")
    on_host = transport == "shm"
    setup = Setup(
        cluster=CLUSTER,
        transport=transport,
        devices=on_gpus(),
        source=KvLayout(1, 8, 2, 8, 128, 16, "bfloat16"),
        target=KvLayout(1, 8, 2, 8, 128, 32, "bfloat16"),
        source_pages=2048,
        target_pages=4096,
        tokens=(64, 512 if on_host else 2048),
        staging_bytes=(512 if on_host else 2048) * MIB,
        lease_s=4.0 if transport == "nccl" else 2.0,
    )
    report = run(setup, faults, gap_s=(0.5, 2.0), requests=200, seed=seed)
    # With NCCL, what waits for a whole device waits for a payload that never comes until its link is given up. Ranks
    # that share a GPU wait while the driver makes the other one's context. On GPUs of their own 0.2 s were seen,
    # probably while the driver took down the context of a process that was killed.
    alone = torch.cuda.device_count() >= 4
    check(report, faults, longest_pass_s=0.3 if alone and transport != "nccl" else 0.5)
