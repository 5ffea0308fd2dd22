"""Helpers for tests that start real clusters: topologies, the command line, and what must not stay behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from splitserve.cluster.log import log_path
from splitserve.cluster.segment_files import FOLDER
from splitserve.deploy.cluster_state import ClusterFolder, ClusterState
from splitserve.deploy.processes import session_members
from tests.ports import free_port

NO_PROCESS = 1 << 22  # beyond all numbers of processes

TOPOLOGY = """
name: {name}
model: {{path: {model}, context: 1024, name: tiny}}
router: {{grpc: "127.0.0.1:{port}", http: "127.0.0.1:{http_port}"}}
prefill: {{kv_memory: 8MiB, {prefill}}}
decode: {{kv_memory: 8MiB, slots: 8, {decode}}}
kv_transfer: {{staging: 4MiB, transport: {transport}}}
"""


def write_topology(
    folder: Path, model: Path, *, prefill: str = "", decode: str = "", transport: str = "auto", router: str = ""
) -> Path:
    """A topology file in `folder` for a cluster named after it, on a free port."""
    name = f"test-{os.getpid()}-{folder.name.replace('_', '-').lower()[-20:]}"
    text = TOPOLOGY.format(
        name=name,
        model=model,
        port=free_port(),
        http_port=free_port(),
        prefill=prefill,
        decode=decode,
        transport=transport,
    )
    file = folder / "topology.yaml"
    file.write_text(text.replace("router: {", "router: {" + router))
    return file


def start_command(*arguments: object) -> subprocess.Popen[str]:
    """As the installed command does, nothing is imported from the working folder."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "splitserve", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_command(*arguments: object, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """`splitserve ARGUMENTS`, to its end. A command that hangs is interrupted, and so cleans up after itself."""
    process = start_command(*arguments)
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        raise AssertionError(f"{arguments} did not end in {timeout_s} s:\n{stdout}\n{stderr}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def succeed(*arguments: object, timeout_s: float = 120) -> str:
    """stdout of a command that must succeed."""
    result = run_command(*arguments, timeout_s=timeout_s)
    assert result.returncode == 0, f"{arguments}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def state_of(name: str) -> ClusterState:
    state = ClusterFolder(name).read()
    assert state is not None
    return state


def units(name: str) -> dict[str, Any]:
    """What `splitserve status` tells of each unit."""
    status = json.loads(succeed("status", name, "--json"))
    return {unit["name"]: unit for unit in status["units"]}


@contextlib.contextmanager
def status_reader(name: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """The function `units` of this cluster, for those who ask often."""
    command = [sys.executable, "-m", "tests.deploy.status_reader", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def read() -> dict[str, Any]:
            print(file=stdin, flush=True)
            return {unit["name"]: unit for unit in json.loads(stdout.readline())["units"]}

        try:
            yield read
        finally:
            stdin.close()


def left_behind(state: ClusterState) -> list[str]:
    """Processes, sockets, segments and files of a cluster that is over."""
    assert state.ray is not None
    left = [f"process {pid}" for pid in session_members(state.ray.owner)]
    left += [str(path) for path in FOLDER.glob(f"splitserve-{state.name}-*")]
    left += [state.ray.folder] if Path(state.ray.folder).exists() else []
    left += [f"state of {state.name}"] if ClusterFolder(state.name).read() else []
    return left + [f"listener at {endpoint}" for endpoint in state.endpoints if is_listening(endpoint)]


def is_listening(endpoint: str) -> bool:
    host, _, port = endpoint.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def away_s(name: str, worker: str, role: str) -> float:
    """Seconds from the last time that `worker` began to drain until it served `role`."""
    logs = ClusterFolder(name).logs
    drained, served = (
        max(datetime.fromisoformat(line["time"]) for line in json_lines(file) if words in line["message"])
        for file, words in (
            (log_path(logs, "supervisor"), f"{worker} drains"),
            (log_path(logs, worker), f" as {role}"),  # its leader has its name where dp is 1
        )
    )
    return (served - drained).total_seconds()


def json_lines(file: Path) -> list[dict[str, Any]]:
    """Of a log; libraries write other lines, too."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")]
