"""`up` on a Ray that `ray start` started, as the files of deploy/ray do it: a token in the home folder, late nodes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.clusters import (
    is_listening,
    run_command,
    start_command,
    state_of,
    succeed,
    wait_until,
    write_topology,
)
from tests.ports import free_port

RAY = str(Path(sys.executable).with_name("ray"))
START_S = 60.0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder with a token made as operators make it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    subprocess.run([RAY, "get-auth-token", "--generate"], check=True, capture_output=True)
    assert (tmp_path / ".ray/auth_token").exists()


@pytest.fixture
def ray_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ss-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder  # a short one, for Ray's sockets


@contextlib.contextmanager
def ray_start(*arguments: str) -> Iterator[None]:
    """A node of a Ray, killed at the block's end: a polite end waits half a minute for actors that live."""
    node = subprocess.Popen(
        [RAY, "start", "--block", *arguments],
        env=os.environ | {"RAY_AUTH_MODE": "token"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


@pytest.mark.usefixtures("home")
def test_up_waits_for_the_nodes_and_starts_again_with_ray(tmp_path: Path, tiny_model: Path, ray_folder: str) -> None:
    router, pool = "node_resource: router, ", "node_resource: pool"
    topology = write_topology(tmp_path, tiny_model, router=router, prefill=pool, decode=pool, transport="tcp")
    topology.write_text(topology.read_text() + "security: {bind: node}\nhosts: {count: 2}\n")
    name, port = topology.read_text().split()[1], free_port()
    address = f"127.0.0.1:{port}"
    head = ["--head", f"--port={port}", "--include-dashboard=false", f"--ray-client-server-port={free_port()}"]
    head += ["--num-cpus=1", '--resources={"router": 1}', f"--temp-dir={ray_folder}"]
    node = [f"--address={address}", "--num-cpus=2", '--resources={"pool": 1}']

    with ray_start(*head):
        wait_until(lambda: is_listening(address), START_S, "the head")
        waiting = start_command("up", topology, "--address", address, "--wait", START_S)
        assert waiting.stderr is not None
        while "waiting for nodes" not in (line := waiting.stderr.readline()):
            assert line, "up ended without waiting"
        with ray_start(*node):
            stdout, stderr = waiting.communicate(timeout=START_S)
            assert waiting.returncode == 0, stdout + stderr
            assert succeed("health") == "serving\n"
            assert "is already running" in succeed("up", topology, "--address", address)
            endpoint = state_of(name).endpoints[0]

    wait_until(lambda: not is_listening(endpoint), START_S, "the router ends with its Ray")
    assert run_command("health").returncode == 1
    with ray_start(*head), ray_start(*node):
        wait_until(lambda: is_listening(address), START_S, "the head")
        succeed("up", topology, "--address", address, "--wait", START_S)
        succeed("health")
        succeed("down", name)
