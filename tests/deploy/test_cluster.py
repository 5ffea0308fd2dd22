"""A real cluster on this host: Ray, ZeroMQ, gRPC and a tiny random model; only the model is small."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from openai import OpenAI

from examples.tiny_moe.tokens import MODEL as TINY_MOE
from splitserve.client import Client, SplitserveClientError
from splitserve.deploy.cluster_state import ClusterFolder, ClusterState
from splitserve.deploy.processes import session_members
from tests.deploy.clusters import (
    left_behind,
    run_command,
    start_command,
    state_of,
    succeed,
    units,
    wait_until,
    write_topology,
)

PROMPT = "The quick brown fox"
BACK_WITHIN_S = 60.0


def name_in(topology: Path) -> str:
    return topology.read_text().split()[1]


def ask(endpoint: str, tokens: int) -> tuple[int, ...]:
    with Client(endpoint) as client:
        return client.generate(PROMPT, max_tokens=tokens, ignore_eos=True, timeout_s=60).result().samples[0].token_ids


def test_a_cluster_lives_through_deaths_and_leaves_nothing(tmp_path: Path, tiny_model: Path) -> None:
    topology = write_topology(tmp_path, tiny_model)
    name = name_in(topology)
    ready = succeed("up", topology)
    state = state_of(name)
    try:
        endpoint = state.endpoints[0]
        assert f"splitserve generate --endpoint {endpoint}" in ready
        assert "already running" in succeed("up", topology)
        before = ask(endpoint, 24)
        assert len(before) == 24
        _check_http(topology, endpoint)

        _kill_while_it_streams(name, endpoint, "decode/0/0")
        wait_until(lambda: units(name)["decode/0/0"]["state"] == "ready", BACK_WITHIN_S, "decode is back")
        decode = units(name)["decode/0/0"]
        assert decode["deaths"] == 1
        assert "ended without a word" in decode["reason"]
        assert ask(endpoint, 24) == before

        running = units(name)
        _kill_supervisor(state)
        adopted = units(name)
        assert {unit["state"] for unit in adopted.values()} == {"ready"}
        assert [unit["workers"] for unit in adopted.values()] == [unit["workers"] for unit in running.values()]

        os.kill(units(name)["router/0"]["workers"][0]["pid"], signal.SIGKILL)
        wait_until(lambda: _answers(endpoint), BACK_WITHIN_S, "the router is back")
        assert ask(endpoint, 24) == before

        _check_commands(name, endpoint, tmp_path)
    finally:
        succeed("down", name)
    assert left_behind(state) == []
    assert "starting decode/0/0" in succeed("logs", "supervisor", "--cluster", name)


def _check_http(topology: Path, endpoint: str) -> None:
    """HTTP gives what gRPC gives, and its prompt's log probabilities are those of the model."""
    router = yaml.safe_load(topology.read_text())["router"]
    with OpenAI(base_url=f"http://{router['http']}/v1", api_key="none") as http, Client(endpoint) as grpc:
        by_http = http.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=24,
            temperature=0,
            echo=True,
            logprobs=1,
            extra_body={"ignore_eos": True},
        )
        by_grpc = grpc.generate(PROMPT, max_tokens=24, ignore_eos=True, logprobs=1, prompt_logprobs=1).result()
    (choice,) = by_http.choices
    assert choice.text == PROMPT + by_grpc.text
    assert choice.logprobs is not None
    expected = [entry.logprob for entry in (*by_grpc.prompt_logprobs, *by_grpc.samples[0].logprobs)]
    assert choice.logprobs.token_logprobs == [None, *expected]


def _kill_while_it_streams(name: str, endpoint: str, engine: str) -> None:
    """With one worker a pool the stream waits for the restart, and then goes on as if nothing had been."""
    undisturbed = ask(endpoint, 400)
    with Client(endpoint) as client:
        stream = iter(client.generate(PROMPT, max_tokens=400, ignore_eos=True, timeout_s=60))
        tokens = list(next(stream).token_ids)
        os.kill(units(name)[engine]["workers"][0]["pid"], signal.SIGKILL)
        for delta in stream:
            tokens += delta.token_ids
    assert tuple(tokens) == undisturbed


def _kill_supervisor(state: ClusterState) -> None:
    """Ray starts it again, and its next answer comes from a new process."""
    assert state.ray is not None
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in session_members(state.ray.owner)}
    (supervisor,) = (pid for pid, command in commands.items() if command.startswith(b"ray::Supervisor"))
    os.kill(supervisor, signal.SIGKILL)
    log = ClusterFolder(state.name).logs / "supervisor.log"
    wait_until(lambda: "adopting router/0" in log.read_text(), BACK_WITHIN_S, "the supervisor is back")


def _answers(endpoint: str) -> bool:
    try:
        return bool(ask(endpoint, 1))
    except SplitserveClientError:
        return False


def _check_commands(name: str, endpoint: str, folder: Path) -> None:
    result = run_command("generate", "--text", PROMPT, "--max-tokens", 8, "--ignore-eos", "--cluster", name)
    assert result.returncode == 0
    assert result.stdout.strip()
    assert "temperature 0 (greedy), seed 0" in " ".join(result.stderr.split())
    assert run_command("chat", "Hello!", "--max-tokens", 4, "--cluster", name).returncode == 0
    talk = [sys.executable, "-m", "splitserve", "chat", "--max-tokens", "4", "--cluster", name]
    talked = subprocess.run(talk, input="Hello!\nAgain?\n", capture_output=True, text=True, timeout=60, check=True)
    assert talked.stderr.count("where the time went") == 2
    figures = folder / "bench.json"
    load = ("--requests", 6, "--warmup", 1, "--concurrency", 3, "--prompt-tokens", 20, "--output-tokens", "uniform:2:9")
    table = succeed("bench", *load, "--json", figures, "--endpoint", endpoint)
    assert "TTFT" in table
    assert json.loads(figures.read_text())["runs"][0]["summary"]["requests"] == 6
    poisson = ("bench", "--requests", 5, "--warmup", 0, "--rate", 20, "--output-tokens", 4, "--endpoint", endpoint)
    assert "5 requests in" in succeed(*poisson)
    refused = run_command("generate", "--text", PROMPT, "--temperature", -1, "--endpoint", endpoint)
    assert refused.returncode == 2
    assert "temperature: found -1" in refused.stderr
    assert "decode/0/0 serves at" in succeed("logs", "decode/0/0")


def test_the_demo_continues_a_text_and_leaves_nothing(tmp_path: Path) -> None:
    topology = write_topology(tmp_path, TINY_MOE)
    demo = run_command("demo", topology, "--text", "ROMEO.\nWhat")
    assert demo.returncode == 0, demo.stderr
    assert len(demo.stdout) > 200
    assert "prefill/0/0 to decode/0/0" in demo.stderr
    assert ClusterFolder(name_in(topology)).read() is None
    assert not list(Path("/dev/shm").glob(f"splitserve-{name_in(topology)}-*"))


def test_an_up_that_fails_says_why_and_leaves_nothing(tmp_path: Path, tiny_model: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-1000] if file.suffix == ".safetensors" else content)
    topology = write_topology(tmp_path, broken)
    result = run_command("up", topology)
    assert result.returncode == 1
    assert "splitserve: error: " in result.stderr
    assert "model.safetensors" in result.stderr
    assert "last lines of the log of" in result.stderr
    assert "Traceback" not in result.stderr
    assert ClusterFolder(name_in(topology)).read() is None
    assert not list(Path("/dev/shm").glob(f"splitserve-{name_in(topology)}-*"))


@pytest.mark.parametrize("after_s", [1.0, 6.0, 9.0])
def test_an_interrupted_up_leaves_nothing(tmp_path: Path, tiny_model: Path, after_s: float) -> None:
    topology = write_topology(tmp_path, tiny_model)
    process = start_command("up", topology, "--foreground")
    time.sleep(after_s)
    state = ClusterFolder(name_in(topology)).read()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), error
    assert ClusterFolder(name_in(topology)).read() is None
    if state is not None:
        assert left_behind(state) == []


@pytest.mark.parametrize("victim", ["owner", "gcs_server"])
def test_up_in_the_foreground_ends_when_its_ray_does(tmp_path: Path, tiny_model: Path, victim: str) -> None:
    topology = write_topology(tmp_path, tiny_model)
    process = start_command("up", topology, "--foreground")
    assert process.stdout is not None
    while "Ctrl-C ends it" not in (line := process.stdout.readline()):
        assert line, "up ended"
    state = state_of(name_in(topology))
    assert state.ray is not None
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in session_members(state.ray.owner)}
    store = next(pid for pid, command in commands.items() if b"gcs/gcs_server" in command.partition(b"\0")[0])
    os.kill(store if victim == "gcs_server" else state.ray.owner.pid, signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"cluster {state.name} has ended, or its Ray has" in error
    assert left_behind(state) == []
