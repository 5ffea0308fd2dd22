"""What the command line says to what cannot be done. No cluster is started here."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest

from splitserve import __version__
from splitserve.cluster.errors import StartupError
from splitserve.cluster.topology_sections import Router
from splitserve.deploy import preflight
from splitserve.deploy.cli import main
from splitserve.deploy.cluster_state import ClusterFolder, ClusterState
from splitserve.deploy.commands import ask, lifecycle
from splitserve.deploy.launch import RunningCluster
from tests.deploy.clusters import write_topology
from tests.ports import free_port
from tests.tiny_model import write_tiny_moe

ERROR = "splitserve: error: "


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status and the one message of a command that must fail without a traceback."""
    status = main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert error.startswith(ERROR), error
    assert "Traceback" not in error
    return status, error.removeprefix(ERROR)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"splitserve {__version__}\n"


def test_a_faulty_topology_names_file_line_and_field(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("name: t\nmodel: {path: m}\ndecode:\n  slot: 4\n")
    for command in ("check", "up", "demo"):
        status, error = fail(capsys, command, file)
        assert status == 2
        assert error == f"{file}:4: decode.slot: found an unknown field; did you mean `slots`?\n"


def test_a_missing_file_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, error = fail(capsys, "up", tmp_path / "none.yaml")
    assert status == 2
    assert "No such file" in error


def test_a_missing_model_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "[/] no-model"
    topology = write_topology(tmp_path, model)
    topology.write_text(topology.read_text().replace(str(model), f'"{model}"'))
    at = f"{topology}:3: model.path: {model}: found"
    commands = ("check",), ("up",), ("demo",), ("bench", "engine")
    for command in commands:
        status, error = fail(capsys, *command, topology)
        assert status == 1
        assert error.startswith(f"{at} nothing there; give a Hugging Face folder"), command
    model.mkdir(parents=True)
    for command in commands:
        assert fail(capsys, *command, topology)[1].startswith(f"{at} a folder without config.json; give"), command
    shutil.copy(tiny_model / "config.json", model)
    for command in commands[1:]:  # a plan needs no weights
        assert fail(capsys, *command, topology)[1].startswith(f"{at} no model.safetensors and no index of"), command


def test_a_port_in_use_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path) -> None:
    file = write_topology(tmp_path, tiny_model)
    port = int(file.read_text().partition("127.0.0.1:")[2].partition('"')[0])
    with socket.create_server(("127.0.0.1", port)):
        status, error = fail(capsys, "up", file)
    assert status == 1
    assert error.startswith(f"router.grpc: cannot listen on 127.0.0.1:{port}: Address already in use")


def test_the_port_of_a_second_router_is_checked_too(tmp_path: Path, tiny_model: Path) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port + 1)):
        router = Router(grpc=f"127.0.0.1:{port}", replicas=2)
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port + 1}"):
            preflight.check_ports(router)
        http = Router(grpc=f"127.0.0.1:{port}", http=f"127.0.0.1:{port + 1}")
        with pytest.raises(StartupError, match=rf"router\.http: cannot listen on 127.0.0.1:{port + 1}"):
            preflight.check_ports(http)


def test_too_many_threads_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path) -> None:
    status, error = fail(capsys, "up", write_topology(tmp_path, tiny_model, decode="threads: 1000"))
    cpus = len(os.sched_getaffinity(0))
    assert status == 1
    assert error == f"decode asks for 1000 threads a rank; this host has {cpus} CPUs: expected at most that\n"


def test_too_few_gpus_are_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "count_gpus", lambda: 1)
    file = write_topology(tmp_path, tiny_model, prefill="device: cuda", decode="device: cuda")
    file.write_text(file.read_text() + "hosts: {gpus: 2}\n")
    status, error = fail(capsys, "up", file)
    assert status == 1
    assert error.startswith("the cluster needs 2 GPUs; there are 1: add hosts")


def test_gpus_are_counted_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert preflight.count_gpus() == 0


def test_what_cannot_run_yet_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write_topology(tmp_path, write_tiny_moe(tmp_path / "moe"), decode="layout: {dp: 2, ep: 2}")
    capsys.readouterr()
    status, error = fail(capsys, "up", file)
    assert status == 1
    assert error.startswith("decode.layout.dp: experts shared over several engines can be checked but not run yet")


def test_too_little_memory_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path) -> None:
    file = write_topology(tmp_path, tiny_model)
    file.write_text(file.read_text().replace("8MiB", "900TB"))
    status, error = fail(capsys, "up", file)
    assert status == 1
    assert "for weights, KV and processes; this host has" in error


@pytest.mark.parametrize(
    "command", [["status"], ["down"], ["logs"], ["generate", "--text", "x"], ["bench"], ["chat", "x"]]
)
def test_without_a_cluster(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    status, error = fail(capsys, *command)
    assert status == 1
    assert error == "no cluster runs here; start one with `splitserve up FILE`\n"


def test_an_endpoint_where_nothing_listens(capsys: pytest.CaptureFixture[str]) -> None:
    status, error = fail(capsys, "generate", "--text", "x", "--endpoint", f"127.0.0.1:{free_port()}")
    assert status == 1
    assert error.startswith("UNAVAILABLE: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--text", ""], "text: found ''; give a prompt"),
        (["bench", "--requests", "0"], "requests: found 0; give a number from 1 to 1000000"),
        (["bench", "--rate", "0"], "rate: found 0.0; give more than 0"),
        (["bench", "--prefix-share", "2"], "prefix-share: found 2.0; give a value from 0 to 1"),
        (["bench", "--prompt-tokens", "uniform:5:1"], "prompt-tokens: found 'uniform:5:1'; expected N, fixed:N,"),
        (["bench", "--output-tokens", "1e30"], "output-tokens: found '1e30'; expected N, fixed:N,"),
        (["bench", "--seed", "-1"], "seed: found -1; give a number from 0"),
        (["bench", "--trace", "/none"], "trace: found '/none'; No such file or directory"),
        (["bench", "--json", "/none/f"], "json: found '/none/f'; name a file that can be written, in a folder that"),
        (["bench", "--json", "/"], "json: found '/'; name a file that can be written, in a folder that exists"),
        (["bench", "--plot", "/none/f.png"], "plot: found '/none/f.png'; name a file that can be written"),
        (["trace", "-o", "/none/f"], "output: found '/none/f'; name a file that can be written"),
        (["health", "--private-key", "/none"], "private-key: found '/none'; No such file"),
        (
            ["health", "--certificate", __file__],
            f"certificate: found {__file__!r}; give it together with --private-key",
        ),
        (["generate", "--text", "x", "--root-certificates", "/none"], "root-certificates: found '/none'; No such file"),
    ],
)
def test_faulty_arguments_are_the_users(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    status, error = fail(capsys, *arguments, "--endpoint", "127.0.0.1:1")
    assert status == 2
    assert error.startswith(message)


@pytest.mark.parametrize("endpoint", ["", "router", "a..b:1", f"{'a' * 64}:1", "\u00fc:1", "[bold]:0", "a:65536"])
def test_an_odd_endpoint_is_the_users(capsys: pytest.CaptureFixture[str], endpoint: str) -> None:
    for command in (("health",), ("top", "--once"), ("bench",)):
        status, error = fail(capsys, *command, "--endpoint", endpoint)
        assert status == 2
        assert error == f"endpoint: found {endpoint!r}; give host:port of a router, such as 127.0.0.1:50061\n"


@pytest.mark.parametrize("lines", [-1, 0, 10**30])
def test_an_odd_number_of_log_lines_is_told(capsys: pytest.CaptureFixture[str], lines: int) -> None:
    status, error = fail(capsys, "logs", "-n", lines)
    assert status == 2
    assert error == f"lines: found {lines}; give a number from 1 to 1000000\n"


@pytest.mark.parametrize("wait", ["nan", "-1", "inf"])
def test_an_odd_wait_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path, wait: str) -> None:
    status, error = fail(capsys, "up", f"--wait={wait}", write_topology(tmp_path, tiny_model))
    assert (status, error) == (2, f"wait: found {float(wait)}; give seconds, 0 to 86400\n")


def test_a_cluster_that_runs_does_not_come_to_the_foreground(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = write_topology(tmp_path, tiny_model)
    state = ClusterState("t", "127.0.0.1:1", str(topology), ("127.0.0.1:2",), None)
    monkeypatch.setattr(lifecycle, "launch", lambda *_: RunningCluster(state, None, is_new=False))
    status, error = fail(capsys, "up", "--foreground", topology)
    assert status == 1
    assert "is already running, and not in the foreground of this command; leave out --foreground, or" in error


def test_a_cluster_whose_ray_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{free_port()}"
    folder = ClusterFolder("gone")
    folder.make()
    folder.write(ClusterState("gone", address, "t.yaml", ("127.0.0.1:1",), None))
    for command in ("status", "down"):
        status, error = fail(capsys, command)
        assert status == 1
        assert error.startswith(f"cannot join the Ray at {address}")
    assert f"if that Ray is gone for good, delete {folder.path}" in error


def test_a_model_alone_gets_a_topology_that_is_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "count_gpus", lambda: 0)
    assert "Lost-Model: found nothing there" in fail(capsys, "up", "--model", tmp_path / "Lost-Model")[1]
    assert not ClusterFolder("lost-model").path.exists()
    monkeypatch.setattr(lifecycle, "launch", stop_there := Mock(side_effect=StartupError("no further")))
    assert main(["up", "--model", str(tiny_model)]) == 1
    error = capsys.readouterr().err
    assert "topology made for this host" in error
    assert f"name: {tiny_model.name}" in error
    assert stop_there.call_args.args[0].topology.prefill is not None


@pytest.mark.parametrize(
    "address", ["auto", "10.0.0.1", "host:port", "a..b:1", f"{'a' * 64}:1", "\u00fc:1", "host:65536"]
)
def test_an_odd_address_is_the_users(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path, address: str
) -> None:
    status, error = fail(capsys, "up", write_topology(tmp_path, tiny_model), "--address", address)
    assert status == 2
    assert error == f"address: found {address!r}; give host:port of a Ray head node\n"


def test_an_address_where_no_ray_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    status, error = fail(capsys, "up", write_topology(tmp_path, tiny_model), "--address", address)
    assert status == 1
    assert error.startswith(f"cannot join the Ray at {address}: [Errno 111] Connection refused")


def test_check_prints_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path) -> None:
    assert main(["check", str(write_topology(tmp_path, tiny_model))]) == 0
    plan = capsys.readouterr().out
    assert "prefill/0/0" in plan
    assert "decode/0/0" in plan
    assert "workers at   127.0.0.1, plain text\n" in plan


def test_check_tells_who_may_command_the_workers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    topology = write_topology(tmp_path, tiny_model)
    plain = topology.read_text()
    for security, told in [
        ("{bind: node}", "node, CURVE with a key made at start"),
        ("{cluster_key: k}", "127.0.0.1, CURVE with k"),
        ("{bind: node, curve: off}", "node, plain text: whoever reaches them may command them"),
    ]:
        topology.write_text(f"{plain}security: {security}\n")
        assert main(["check", str(topology)]) == 0
        assert f"workers at   {told}\n" in capsys.readouterr().out


def test_a_missing_cluster_key_is_told_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    topology = write_topology(tmp_path, tiny_model)
    topology.write_text(f"{topology.read_text()}security: {{cluster_key: {tmp_path}/k}}\n")
    status, error = fail(capsys, "up", topology)
    assert status == 1
    assert error.startswith(f"security.cluster_key: {tmp_path}/k: No such file or directory")


def test_what_the_system_refuses_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "a file"))
    status, error = fail(capsys, "up", write_topology(tmp_path, tiny_model))
    assert (status, error.count("\n")) == (1, 1)
    assert f"{tmp_path / 'a file'}/splitserve" in error
    assert "Not a directory" in error


def test_a_reader_that_has_had_enough_is_no_fault() -> None:
    command = f"{sys.executable} -m splitserve schema | head -c 10"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (len(result.stdout), result.stderr) == (10, "")


def test_the_demo_asks_with_the_environments_key(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLITSERVE_API_KEY", "sk-mine")
    for name in ("launch", "stop", "show_answer"):
        monkeypatch.setattr(ask, name, MagicMock())
    monkeypatch.setattr(ask, "Client", client := MagicMock())
    assert main(["demo", str(write_topology(tmp_path, tiny_model)), "--text", "x"]) == 0
    assert client.call_args.kwargs["api_key"] == "sk-mine"


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert "prefill" in json.loads(capsys.readouterr().out)["properties"]


def test_cache_of_converted_models(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLITSERVE_CACHE", str(tmp_path))
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == "0 B freed\n"


def test_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("generate", "chat"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "0 is greedy (default: 0.0)" in text
        assert "repeats a sampled answer (default: 0)" in text


def test_commands_that_need_no_ray_import_none() -> None:
    code = "import sys, splitserve.deploy.cli; print({'ray', 'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
