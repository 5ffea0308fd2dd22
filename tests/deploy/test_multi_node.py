"""Several Ray nodes (raylets of one host): router, prefill and decode each on their own, KV over TCP."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitserve.client import Client
from splitserve.cluster.cluster_key import write_cluster_key
from splitserve.deploy.cluster_state import ClusterFolder
from tests.deploy.clusters import run_command, state_of, succeed, units, wait_until, write_topology

NODES = ("router_node", "prefill_node", "decode_node")
PROMPT = "Zwölf Boxkämpfer jagen Viktor"


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running Ray with a node for each of NODES; it asks for a token, which is in the environment."""
    log_file = tmp_path_factory.mktemp("nodes") / "nodes.log"
    with pytest.MonkeyPatch.context() as environment, log_file.open("w") as log:
        environment.setenv("RAY_AUTH_MODE", "token")
        environment.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        command = [sys.executable, "-m", "tests.deploy.ray_nodes", *NODES]
        nodes = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        assert nodes.stdin is not None
        assert nodes.stdout is not None
        try:
            address = nodes.stdout.readline().strip()
            assert address, log_file.read_text()
            yield address
            nodes.stdin.close()
            assert nodes.wait(60) == 0
        finally:
            if nodes.poll() is None:
                os.killpg(nodes.pid, signal.SIGKILL)
                nodes.wait()
            nodes.stdout.close()


def test_pools_on_nodes_of_their_own(tmp_path: Path, tiny_model: Path, ray_address: str) -> None:
    topology = write_topology(
        tmp_path,
        tiny_model,
        router="node_resource: router_node, ",
        prefill="node_resource: prefill_node, layout: {tp: 2}",
        decode="node_resource: decode_node",
        transport="tcp",
    )
    key = tmp_path / "cluster.key"
    write_cluster_key(key)
    topology.write_text(topology.read_text() + f"security: {{bind: node, cluster_key: {key}}}\nhosts: {{count: 2}}\n")
    name = topology.read_text().split()[1]
    succeed("up", topology, "--address", ray_address)
    try:
        endpoint = state_of(name).endpoints[0]
        running = units(name)
        assert set(running) == {"prefill/0/0", "decode/0/0", "router/0"}
        assert len({unit["workers"][0]["node"] for unit in running.values()}) == 3
        answer = ask(endpoint)
        assert len(answer) == 16

        leader, follower = sorted(running["prefill/0/0"]["workers"], key=lambda worker: str(worker["name"]))
        assert leader["node"] == follower["node"]
        os.kill(follower["pid"], signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{leader['pid']}").exists(), 30, "the leader ends with its follower")
        wait_until(lambda: units(name)["prefill/0/0"]["state"] == "ready", 60, "prefill is back")
        assert ask(endpoint) == answer
        assert "prefill/0/0 serves at" in succeed("logs", "prefill/0/0")
        assert "no worker 'prefill/0/7' here" in run_command("logs", "prefill/0/7").stderr
        assert "is already running" in succeed("up", topology, "--address", ray_address)
        pids = [worker["pid"] for unit in units(name).values() for worker in unit["workers"]]
    finally:
        succeed("down", name)
    assert ClusterFolder(name).read() is None
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10, "the workers' end")


def test_what_ray_does_not_have_is_told_at_once(tmp_path: Path, tiny_model: Path, ray_address: str) -> None:
    too_many = write_topology(tmp_path, tiny_model, decode="replicas: 9")
    result = run_command("up", too_many, "--address", ray_address)
    assert result.returncode == 1
    assert "the cluster needs 11 CPUs; this Ray has 6" in result.stderr
    nowhere = write_topology(tmp_path, tiny_model, router="node_resource: gold, ")
    result = run_command("up", nowhere, "--address", ray_address)
    assert result.returncode == 1
    assert "router.node_resource: no node of this Ray carries 'gold'" in result.stderr


def test_what_no_node_has_room_for_is_told(tmp_path: Path, tiny_model: Path, ray_address: str) -> None:
    """Nodes of two CPUs have three together, and Ray would wait for one that has them."""
    topology = write_topology(tmp_path, tiny_model, prefill="threads: 3", decode="threads: 1")
    topology.write_text(topology.read_text() + "security: {bind: node}\n")
    result = run_command("up", topology, "--address", ray_address)
    assert result.returncode == 1
    assert "prefill/0/0: no node has room for 3 CPU; add hosts, or ask for fewer ranks or threads" in result.stderr
    assert ClusterFolder(topology.read_text().split()[1]).read() is None


def test_whoever_has_one_node_only_is_placed_first(tmp_path: Path, tiny_model: Path, ray_address: str) -> None:
    """Of six CPUs in all, a pool without `node_resource` must leave the router's."""
    sections = {"router": "node_resource: router_node, ", "prefill": "replicas: 4", "decode": "replicas: 1"}
    topology = write_topology(tmp_path, tiny_model, **sections)
    topology.write_text(topology.read_text() + "security: {bind: node}\n")
    succeed("up", topology, "--address", ray_address, timeout_s=180)
    succeed("down", topology.read_text().split()[1])


def ask(endpoint: str) -> tuple[int, ...]:
    with Client(endpoint) as client:
        return client.generate(PROMPT, max_tokens=16, ignore_eos=True, timeout_s=60).result().samples[0].token_ids
