"""Real local Rays, without workers: what is left when their owner, or who started it, ends in any way."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from splitserve.cluster.errors import StartupError
from splitserve.cluster.segment_files import FOLDER
from splitserve.deploy.cluster_state import ClusterFolder, ClusterState, LocalRay
from splitserve.deploy.local_ray import start_local_ray, stop_local_ray
from splitserve.deploy.preflight import count_gpus
from splitserve.deploy.processes import Process, session_members
from tests.deploy.clusters import NO_PROCESS, wait_until

GONE_S = 20.0


@pytest.fixture
def folder() -> ClusterFolder:
    folder = ClusterFolder(f"test-{os.getpid()}-ray")
    folder.make()
    return folder


def write_state(folder: ClusterFolder, ray: LocalRay, address: str) -> None:
    folder.write(ClusterState(folder.name, address, "topology.yaml", ("127.0.0.1:1",), ray))


def is_gone(ray: LocalRay) -> bool:
    return not any(session_members(ray.owner)) and not Path(ray.folder).exists()


def test_start_and_stop_leave_nothing(folder: ClusterFolder) -> None:
    started = start_local_ray(folder, 3, 0)
    write_state(folder, started.ray, started.address)
    assert len(list(session_members(started.ray.owner))) > 3
    assert stat.S_IMODE(folder.token.stat().st_mode) == 0o600
    assert folder.live() is not None
    segment = FOLDER / f"splitserve-{folder.name}-{NO_PROCESS}-0123abcd"
    segment.touch()
    other = FOLDER / f"splitserve-{folder.name}-1-{NO_PROCESS}-0123abcd"
    other.touch()
    try:
        stop_local_ray(folder, started.ray)
        assert is_gone(started.ray)
        assert not segment.exists()
        assert other.exists()  # that of a cluster with a longer name
        assert folder.live() is None
        assert not folder.token.exists()
    finally:
        other.unlink()


def test_it_starts_from_any_folder_and_keeps_its_sockets_private(
    folder: ClusterFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where files lie that are called like modules, say, and beside a Ray of somebody else's."""
    for module in ("secrets", "torch", "queue"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('imported from the working folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    started = start_local_ray(folder, 1, 0)
    try:
        assert stat.S_IMODE(Path(started.ray.folder).stat().st_mode) == 0o700
        assert list(Path(started.ray.folder).rglob("sockets"))
        assert count_gpus() >= 0
    finally:
        stop_local_ray(folder, started.ray)
    assert is_gone(started.ray)


def test_a_killed_owner_takes_everything_along(folder: ClusterFolder) -> None:
    started = start_local_ray(folder, 3, 0)
    write_state(folder, started.ray, started.address)
    os.kill(started.ray.owner.pid, signal.SIGKILL)
    wait_until(lambda: is_gone(started.ray), GONE_S, "everything gone")
    assert folder.live() is None


def test_a_ray_ends_with_whoever_started_it_unless_kept(folder: ClusterFolder) -> None:
    code = (
        "import dataclasses, json, os, sys; from splitserve.deploy.cluster_state import ClusterFolder\n"
        "from splitserve.deploy.local_ray import start_local_ray\n"
        "started = start_local_ray(ClusterFolder(sys.argv[1]), 2, 0)\n"
        "ray = started.ray; print(ray.owner.pid, ray.owner.started, ray.folder, flush=True); os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", code, folder.name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    pid, begun, path = result.stdout.split()
    ray = LocalRay(Process(int(pid), int(begun)), path)
    wait_until(lambda: is_gone(ray), GONE_S, "everything gone")


def test_a_ray_that_cannot_start_says_why(folder: ClusterFolder) -> None:
    with pytest.raises(StartupError, match=r"(?s)did not start; its last words.*ray\.log.*-1"):
        start_local_ray(folder, -1, 0)
    assert not folder.token.exists()
