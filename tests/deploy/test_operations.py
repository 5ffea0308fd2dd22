"""Commands that change a real cluster under load: every request ends, with the tokens of an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from splitserve.client import Client
from splitserve.deploy.cluster_state import ClusterFolder
from splitserve.deploy.processes import session_members
from tests.deploy.clusters import (
    away_s,
    left_behind,
    run_command,
    start_command,
    state_of,
    status_reader,
    succeed,
    wait_until,
    write_topology,
)
from tests.deploy.load import Load

pytestmark = pytest.mark.timeout(
    600
)  # every command is a process that imports Ray, on cores that the cluster keeps busy
SWITCH_S = 5.0
LONG = 900


@dataclass(frozen=True)
class Running:
    """A cluster of this test, and the file that describes it."""

    name: str
    file: Path
    units: Callable[[], dict[str, Any]]

    def states(self) -> dict[str, str]:
        return {name: unit["state"] for name, unit in self.units().items()}

    def pid(self, unit: str) -> int:
        return int(self.units()[unit]["workers"][0]["pid"])

    def until(self, unit: str, state: str) -> None:
        wait_until(lambda: self.states()[unit] == state, 60, f"{unit} is {state}")

    def until_logged(self, line: str, times: int = 1) -> None:
        """Wait for a line of the supervisor, which is sooner seen than a status."""
        log = ClusterFolder(self.name).logs / "supervisor.log"
        wait_until(lambda: log.read_text().count(line) >= times, 60, line)

    def load(self) -> Load:
        return Load(state_of(self.name).endpoints)

    def rewrite(self, **sections: dict[str, Any]) -> None:
        """Change fields of the topology file."""
        raw = yaml.safe_load(self.file.read_text())
        for section, fields in sections.items():
            raw[section] |= fields
        self.file.write_text(yaml.safe_dump(raw, sort_keys=False))


@contextlib.contextmanager
def running(folder: Path, model: Path, **sections: str) -> Iterator[Running]:
    file = write_topology(folder, model, **{"prefill": "replicas: 2", "decode": "replicas: 2"} | sections)
    name = yaml.safe_load(file.read_text())["name"]
    succeed("up", file)
    state = state_of(name)
    try:
        with status_reader(name) as read:
            yield Running(name, file, read)
    finally:
        succeed("down", name)
    assert left_behind(state) == []


def refused(*arguments: object) -> str:
    """stderr of a command that must be refused as the user's fault."""
    result = run_command(*arguments)
    assert result.returncode == 2, f"{arguments}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stderr


def test_drain(tmp_path: Path, tiny_model: Path) -> None:
    with running(tmp_path, tiny_model, router="replicas: 2, ") as cluster, cluster.load() as load:
        pid = cluster.pid("decode/1/0")
        assert "decode/1/0 is drained" in succeed("drain", "decode/1/0")
        assert cluster.states()["decode/1/0"] == "drained"
        assert not Path(f"/proc/{pid}").exists()
        load.pass_by()
        succeed("drain", "decode/1/0")  # twice is once

        both = [start_command("undrain", "decode/1/0"), start_command("drain", "prefill/0/0", "--deadline", 0)]
        assert [command.wait(60) for command in both] == [0, 0]
        assert cluster.states() == dict.fromkeys(cluster.states(), "ready") | {"prefill/0/0": "drained"}
        load.pass_by()

        answered = load.answers
        last = run_command("drain", "prefill/1/0")
        assert "no worker for prefill is left: requests wait" in last.stderr
        succeed("undrain", "prefill/0/0")
        load.pass_by()
        assert load.answers > answered

        succeed("drain", "router/1", "--deadline", 0)
        load.pass_by()
        succeed("undrain", "router/1")
        load.pass_by()
        assert "there are prefill/0/0, prefill/1/0" in run_command("drain", "decode/7/0").stderr
        assert "--deadline: invalid number of seconds value: '-1'" in refused("drain", "decode/0/0", "--deadline=-1")


def test_deaths_while_it_drains(tmp_path: Path, tiny_model: Path) -> None:
    """Of the worker, of the command, of the supervisor: the drain goes on."""
    with running(tmp_path, tiny_model) as cluster:
        with cluster.load() as load, long_streams(cluster) as ended:
            pid = cluster.pid("decode/1/0")
            drain = start_command("drain", "decode/1/0")
            cluster.until_logged("decode/1/0 drains")
            os.kill(pid, signal.SIGKILL)
            assert drain.wait(60) == 0
            assert cluster.units()["decode/1/0"]["deaths"] == 1
            load.pass_by()
            ended()
            succeed("undrain", "decode/1/0")
        with cluster.load() as load, long_streams(cluster):
            drain = start_command("drain", "decode/0/0")
            cluster.until_logged("decode/0/0 drains")
            drain.kill()
            drain.wait()
            kill_supervisor(cluster)
            cluster.until("decode/0/0", "drained")
            assert cluster.states()["decode/1/0"] == "ready"
            load.pass_by()


@contextlib.contextmanager
def long_streams(cluster: Running) -> Iterator[Any]:
    """Streams on all decode engines that take a while; the context's value waits for them. All must end well."""
    prompts = [[7, 8, 9, 10 + number] for number in range(6)]
    sampling: Any = {"max_tokens": LONG, "ignore_eos": True, "timeout_s": 120}
    with Client(state_of(cluster.name).endpoints) as client:
        expected = client.generate(prompts[0], **sampling).result().samples[0].token_ids
        streams = [iter(client.generate(prompt, **sampling)) for prompt in prompts]
        tokens = [list(next(stream).token_ids) for stream in streams]

        def end() -> None:
            for stream, known in zip(streams, tokens, strict=True):
                for delta in stream:
                    known += delta.token_ids

        yield end
        end()
    assert [len(known) for known in tokens] == [LONG] * len(prompts)
    assert tuple(tokens[0]) == expected


def kill_supervisor(cluster: Running) -> None:
    ray = state_of(cluster.name).ray
    assert ray is not None
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in session_members(ray.owner)}
    (supervisor,) = (pid for pid, command in commands.items() if command.startswith(b"ray::Supervisor"))
    os.kill(supervisor, signal.SIGKILL)
    cluster.until_logged("adopting ")


def test_scale(tmp_path: Path, tiny_model: Path) -> None:
    with running(tmp_path, tiny_model) as cluster:
        router = cluster.pid("router/0")
        with cluster.load() as load:
            succeed("scale", "decode", 3)
            load.pass_by()
            assert cluster.states()["decode/2/0"] == "ready"
            succeed("scale", "decode", 1)
            load.pass_by()
            assert set(cluster.states()) == {"prefill/0/0", "prefill/1/0", "decode/0/0", "router/0"}

            at_once = [start_command("scale", "prefill", 1), start_command("scale", "decode", 2)]
            assert [command.wait(120) for command in at_once] == [0, 0]
            assert set(cluster.states()) == {"prefill/0/0", "decode/0/0", "decode/1/0", "router/0"}
            load.pass_by()
            assert "replicas: found 0; Input should be greater than or equal to 1" in refused("scale", "decode", 0)
            too_many = run_command("scale", "decode", 1000)
            assert too_many.returncode == 1
            assert "for weights, KV and processes; this host has" in too_many.stderr
            succeed("scale", "router", 2)
            assert cluster.pid("router/0") == router
        with cluster.load() as by_both:
            assert len(state_of(cluster.name).endpoints) == 2
            by_both.pass_by()


def test_roll(tmp_path: Path, tiny_model: Path) -> None:
    with running(tmp_path, tiny_model, router="replicas: 2, ") as cluster:
        before = {name: cluster.pid(name) for name in cluster.units()}
        with cluster.load() as load:
            cluster.rewrite(decode={"kv_memory": "6MiB", "page_size": 32})
            assert f"is as {cluster.file} says after" in succeed("up", cluster.file)
            after = {name: cluster.pid(name) for name in before}
            assert {name for name in before if after[name] != before[name]} == {"decode/0/0", "decode/1/0"}
            assert "already running" in succeed("up", cluster.file)
            load.pass_by()

            restart = start_command("restart")
            cluster.until_logged("prefill/0/0 drains")
            restart.kill()
            restart.wait()
            kill_supervisor(cluster)
            wait_until(lambda: all_new(cluster, after), 120, "all workers have started anew")
            load.pass_by()
            assert {unit["deaths"] for unit in cluster.units().values()} == {0}

        for section, field, value in (("model", "context", 512), ("router", "grpc", "127.0.0.1:1")):
            cluster.rewrite(**{section: {field: value}})
            assert f"{section}.{field}: found '{value}'; it cannot change while" in refused("up", cluster.file)
            cluster.rewrite(**{section: {field: {"context": 1024, "grpc": state_of(cluster.name).endpoints[0]}[field]}})
        _roll_with_a_file_that_is_not_there(cluster)
        assert "already running" in succeed("up", cluster.file)
        _roll_that_cannot_go_on(cluster)


def _roll_with_a_file_that_is_not_there(cluster: Running) -> None:
    """It is told before a worker is drained that could not start again."""
    right, before = cluster.file.read_text(), {name: cluster.pid(name) for name in cluster.units()}
    cluster.file.write_text(f"{right}security: {{api_keys: {cluster.file.parent}/keys.toml}}\n")
    failed = run_command("up", cluster.file)
    assert "security.api_keys" in failed.stderr
    assert "No such file or directory" in failed.stderr
    assert {name: cluster.pid(name) for name in before} == before
    cluster.file.write_text(right)


def _roll_that_cannot_go_on(cluster: Running) -> None:
    """It stops at its first worker, all others serve, and a file that is right goes on from there."""
    before = {name: cluster.pid(name) for name in cluster.units()}
    cluster.rewrite(kv_transfer={"staging": "900GiB"})
    with cluster.load() as load:
        failed = run_command("up", cluster.file)
        assert failed.returncode == 1
        assert "staging: /dev/shm has no room for" in failed.stderr
        serving = {name for name, state in cluster.states().items() if state == "ready"}
        assert len(serving) == len(before) - 1
        assert {name: cluster.pid(name) for name in serving} == {name: before[name] for name in serving}
        load.pass_by()
        cluster.rewrite(kv_transfer={"staging": "5MiB"})
        assert f"is as {cluster.file} says after" in succeed("up", cluster.file)
        assert set(cluster.states().values()) == {"ready"}
        load.pass_by()


def all_new(cluster: Running, before: dict[str, int]) -> bool:
    now = cluster.units()
    settled = all(unit["state"] == "ready" and unit["current"] for unit in now.values())
    return settled and all(unit["workers"][0]["pid"] != before[name] for name, unit in now.items())


@pytest.mark.parametrize("tp", [1, 2])
def test_switch(tmp_path: Path, tiny_model: Path, tp: int) -> None:
    layout = f"replicas: 2, layout: {{tp: {tp}}}"
    with running(tmp_path, tiny_model, prefill=layout, decode=layout) as cluster, cluster.load() as load:
        for worker, role in (("decode/1/0", "prefill"), ("decode/1/0", "decode"), ("prefill/0/0", "decode")):
            pid = cluster.pid(worker)
            assert f"{worker} serves as {role} after" in succeed("switch", worker, role)
            assert away_s(cluster.name, worker, role) < SWITCH_S
            assert (cluster.units()[worker]["role"], cluster.pid(worker)) == (role, pid)
            load.pass_by()
        os.kill(cluster.pid("prefill/0/0"), signal.SIGKILL)
        cluster.until_logged("prefill/0/0 is dead")
        cluster.until("prefill/0/0", "ready")
        assert cluster.units()["prefill/0/0"]["role"] == "decode"
        load.pass_by()
        assert "no engine would be left for prefill" in refused("switch", "prefill/1/0", "decode")
        assert "role: found 'router'; expected prefill or decode" in refused("switch", "decode/0/0", "router")
