"""`splitserve top`: its frames, and the command in a terminal."""

from __future__ import annotations

import asyncio
import fcntl
import io
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from rich.console import Console

from splitserve.client import ClusterStatus, Engine, Latency
from splitserve.deploy.cli import main
from splitserve.deploy.commands.connection import Credentials
from splitserve.deploy.top import Look, Watch, frame
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.service import RouterService
from tests.ports import free_port
from tests.router.routers import running_router

NOBODY: Credentials = {"root_certificates": None, "certificate": None, "api_key": None}
PREFILL = Engine(
    name="prefill/0/0",
    role="prefill",
    incarnation="a",
    state="ready",
    running=1,
    waiting=2,
    free_kv_tokens=250,
    total_kv_tokens=1000,
    preemptions=0,
    last_seen_s=0.1,
    slots=0,
    queried_tokens=1000,
    cached_tokens=0,
    prompt_tokens=1000,
    output_tokens=10,
    decode_steps=0,
)
DECODE = replace(PREFILL, name="decode/0/0", role="decode", slots=32, preemptions=3, decode_steps=100)
STATUS = ClusterStatus(
    "demo", "0.1.0", "tiny", (PREFILL, DECODE), 7, 5, 60.0, 42, Latency(0.1234, 0.5), Latency(0.0101, 0.02)
)
AT = 1000.0


def rendered(before: Look, now: Look, width: int = 80) -> list[list[str]]:
    """The words of each line."""
    out = io.StringIO()
    Console(file=out, width=width).print(frame(before, now))
    return [line.replace(" ms", "ms").split() for line in out.getvalue().splitlines()]


def look(at: float, *engines: Engine) -> Look:
    return Look({"127.0.0.1:1": replace(STATUS, engines=engines)}, at)


def test_rates_are_those_between_two_looks() -> None:
    prefill = replace(PREFILL, queried_tokens=1400, cached_tokens=100, prompt_tokens=1300, output_tokens=14)
    decode = replace(DECODE, output_tokens=330, decode_steps=120)
    lines = rendered(look(AT, PREFILL, DECODE), look(AT + 2, prefill, decode))
    assert ["127.0.0.1:1", "7", "5", "42", "123.4ms", "500.0ms", "10.1ms", "20.0ms"] in lines
    assert ["prefill/0/0", "ready", "1", "2", "75%", "150", "2", "25%", "0"] in lines
    assert ["decode/0/0", "ready", "1/32", "2", "75%", "0", "160", "16.0", "3"] in lines
    assert ["in", "all", "150", "prompt", "tokens/s", "computed,", "162", "output", "tokens/s"] in lines
    assert lines[0] == ["cluster", "demo,", "model", "tiny"]


def test_an_engine_that_began_anew_counts_from_0() -> None:
    anew = replace(DECODE, incarnation="b", output_tokens=50, decode_steps=10)
    lines = rendered(look(AT, DECODE), look(AT + 1, anew))
    assert next(line for line in lines if line[:1] == ["decode/0/0"])[6:8] == ["50", "5.0"]


def test_silence_and_nothing_are_shown_too() -> None:
    silent = replace(DECODE, state="silent", total_kv_tokens=0, free_kv_tokens=0)
    lines = rendered(look(AT, silent), look(AT, silent))
    assert ["decode/0/0", "silent", "1/32", "2", "0%", "0", "0", "3"] in lines
    nobody = Look({"[::1]:1": None, "127.0.0.1:2": None}, AT)
    lines = rendered(nobody, nobody)
    assert lines[0] == ["no", "router", "answers"]
    assert ["[::1]:1", "no", "answer"] in lines
    assert ["127.0.0.1:2", "no", "answer"] in lines


def test_large_numbers_fit_80_columns() -> None:
    busy = replace(DECODE, running=999, slots=1024, waiting=1000, output_tokens=99_999, decode_steps=199)
    words = rendered(look(AT, DECODE), look(AT + 1, replace(busy, preemptions=123_456)))
    slow = replace(STATUS, active_requests=1024, queued_requests=1000, recent_requests=9999)
    slow = replace(slow, ttft=Latency(0.9999, 59.994), tpot=Latency(1.0, 600.0))
    words += rendered(look(AT), Look({"127.0.0.1:50061": slow}, AT))
    assert ["127.0.0.1:50061", "1024", "1000", "9999", "999.9ms", "59.99", "s", "1.00", "s", "600", "s"] in words
    assert ["decode/0/0", "ready", "999/1024", "1000", "75%", "0", "99,989", "1010.0", "123456"] in words


def with_router(scenario: Callable[[RouterService], Awaitable[None]]) -> None:
    async def run() -> None:
        async with running_router(cluster) as (service, client):
            loading = asyncio.ensure_future(client.generate([5, 6, 7], max_tokens=200).result())
            await scenario(service)
            await loading

    with FakeCluster(behaviour=Behaviour(step_s=0.01)) as cluster:
        asyncio.run(run())


def test_a_router_that_is_gone_is_a_row_beside_one_that_answers() -> None:
    async def scenario(service: RouterService) -> None:
        watch = Watch([f"127.0.0.1:{free_port()}", service.address], NOBODY)
        seen = await asyncio.to_thread(watch.look)
        watch.close()
        assert [status is None for status in seen.routers.values()] == [True, False]
        assert {engine.name for engine in seen.engines.values()} == {"prefill/0/0", "decode/0/0"}

    with_router(scenario)


def test_without_a_terminal_it_prints_one_frame(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(service: RouterService) -> None:
        assert await asyncio.to_thread(main, ["top", "--endpoint", service.address]) == 0

    with_router(scenario)
    assert "decode/0/0" in capsys.readouterr().out


def read_until(terminal: int, text: str, count: int, within_s: float = 60.0) -> str:
    seen, limit = "", time.monotonic() + within_s
    while seen.count(text) < count:
        assert time.monotonic() < limit, seen
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 65536).decode(errors="replace")
    return seen


def test_in_a_terminal_it_goes_on_until_ctrl_c_and_leaves_the_screen_as_it_was() -> None:
    def watch(address: str) -> None:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        command = [sys.executable, "-m", "splitserve", "top", "--endpoint", address]
        # A session of its own whose terminal this is, so that Ctrl-C reaches it.
        process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm"},
        )
        os.close(theirs)
        try:
            seen = read_until(ours, "output tokens/s", 3)
            assert "decode/0/0" in seen
            assert "\x1b[?1049h" in seen, "on a screen of its own"
            os.write(ours, b"\x03")
            left = read_until(ours, "\x1b[?1049l", 1)
            assert "\x1b[?25h" in left, "the cursor is back"
            assert "Traceback" not in left
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
            os.close(ours)

    async def scenario(service: RouterService) -> None:
        await asyncio.to_thread(watch, service.address)

    with_router(scenario)
