"""Where the time of a request went, in Chrome's trace event format."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest

from splitserve.client import SplitserveClientError
from splitserve.deploy.cli import main
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.timeline import Span, Timings
from splitserve.router.traces import MOST_TRACES, Latency, RecentRequests, RequestTrace, chrome_trace
from tests.router.routers import eventually, running_router

Event = dict[str, Any]
BEHAVIOUR = Behaviour(prefill_s=0.05, transfer_s=0.03, step_s=0.005)
SECRET = "swordfish"


def phases(trace: str) -> list[Event]:
    """All phases, each with the process that it passed in."""
    events = json.loads(trace)["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    return [event | {"engine": names[event["pid"]]} for event in events if event["ph"] == "X"]


def assert_nested(events: list[Event]) -> None:
    """On each track an event lies within another one or beside it: Perfetto drops what overlaps."""
    tracks: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in events:
        assert event["dur"] >= 0, event
        tracks[event["pid"], event["tid"]].append(event)
    for track in tracks.values():
        for one in track:
            for other in track:
                begins, ends = other["ts"] - one["ts"], other["ts"] + other["dur"] - one["ts"] - one["dur"]
                apart = begins >= one["dur"] - 1 or -begins >= other["dur"] - 1
                assert apart or begins * ends <= 1, (one, other)


def test_a_request_shows_its_phases_on_the_engines_that_they_passed_on() -> None:
    async def scenario() -> None:
        async with running_router(cluster) as (service, client):
            began = time.time()
            completion = await client.generate(SECRET, max_tokens=20).result()
            trace = await client.trace(completion.request_id)
            async with httpx2.AsyncClient(base_url=f"http://{service.http_address}") as http:
                answer = await http.post("/v1/completions", json={"prompt": SECRET, "max_tokens": 2})
                by_http = await http.get(f"/trace/{answer.json()['id']}")
                everything = await http.get("/trace")
        assert SECRET not in trace
        found = {event["name"]: event for event in phases(trace)}
        assert [(event["name"], event["engine"]) for event in phases(trace)] == [
            ("request", "router"),
            ("queue", "router"),
            ("prefill queue", "prefill/0/0"),
            ("prefill", "prefill/0/0"),
            ("KV transfer", "decode/0/0"),
            ("decode", "decode/0/0"),
        ]
        assert began <= found["request"]["ts"] / 1e6 <= time.time()
        assert found["prefill"]["dur"] == pytest.approx(50_000, abs=20_000)
        assert found["KV transfer"]["dur"] == pytest.approx(30_000, abs=20_000)
        assert found["decode"]["dur"] == pytest.approx(18 * 5_000, abs=50_000)
        inner = phases(trace)[1:]
        for before, after in pairwise(inner):
            assert before["ts"] + before["dur"] == pytest.approx(after["ts"], abs=1_000), "phases follow one another"
        assert found["request"]["args"] == {
            "request_id": completion.request_id,
            "code": "OK",
            "prompt_tokens": completion.summary.usage.prompt_tokens,
            "cached_tokens": 0,
            "output_tokens": 20,
        }
        assert_nested(phases(trace))
        assert [event["args"]["output_tokens"] for event in phases(by_http.text) if event["name"] == "request"] == [2]
        assert sum(event["name"] == "request" for event in phases(everything.text)) == 2
        assert_nested(phases(everything.text))

    with FakeCluster(behaviour=BEHAVIOUR) as cluster:
        asyncio.run(scenario())


def test_attempts_that_were_lost_say_why() -> None:
    async def scenario() -> None:
        async with running_router(cluster, worker_timeout_s=0.5, policy="round_robin") as (_, client):
            running = asyncio.ensure_future(client.generate([5, 6, 7], max_tokens=60).result())
            await eventually(lambda: len(cluster.engines["decode/0/0"].decoding) == 1)
            cluster.kill("decode/0/0")
            trace = await client.trace((await running).request_id)
        assert_nested(phases(trace))
        decodes = [event for event in phases(trace) if event["name"] == "decode"]
        assert [event["engine"] for event in decodes] == ["decode/0/0", "decode/1/0"]
        assert "decode/0/0 silent" in decodes[0]["args"]["lost"]
        assert "lost" not in decodes[1]["args"]
        assert [event["args"]["attempt"] for event in phases(trace) if event["name"] == "queue"] == [1, 2]

    with FakeCluster(1, 2, Behaviour(step_s=0.01)) as cluster:
        asyncio.run(scenario())


def test_requests_that_never_got_an_engine_have_waited_all_the_time() -> None:
    async def scenario() -> None:
        async with running_router(cluster) as (service, client):
            service.set_members([])
            with pytest.raises(SplitserveClientError):
                await client.generate([5], timeout_s=0.3).result()
            await asyncio.sleep(0.1)
            request, queue = phases(await client.trace())
            assert request["args"]["code"] in ("CANCELLED", "DEADLINE_EXCEEDED")
            assert queue["dur"] == pytest.approx(request["dur"], abs=1_000)
            with pytest.raises(SplitserveClientError, match="no request 'nobody' is among the last"):
                await client.trace("nobody")

    with FakeCluster() as cluster:
        asyncio.run(scenario())


def request_trace(number: int) -> RequestTrace:
    return RequestTrace(f"r-{number}", "OK", 0.0, 1.0, 1, 0, 1, lambda: [Span("queue", "", 0.0, 0.5)])


def test_only_the_last_requests_are_kept() -> None:
    recent = RecentRequests()
    for number in range(3 * MOST_TRACES):
        recent.add(request_trace(number))
    assert len(phases(recent.chrome_trace(""))) == 2 * MOST_TRACES
    assert phases(recent.chrome_trace(f"r-{2 * MOST_TRACES}"))


def test_no_requests_are_a_trace_too() -> None:
    assert json.loads(chrome_trace([]))["traceEvents"] == []


def test_latencies_are_those_of_answers_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    recent, now = RecentRequests(), time.monotonic()
    assert recent.latencies().ttft == Latency(0.0, 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: now - 61)
    recent.answered(Timings(0, 0, 0, 0, 99.0, 99.0, 0))
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for hundredth in range(101):
        recent.answered(Timings(0, 0, 0, 0, (1 + hundredth) / 100, 0.0, 0))
    found = recent.latencies()
    assert (found.requests, found.ttft, found.tpot) == (101, Latency(0.51, 1.0), Latency(0.0, 0.0))


def test_the_command_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with running_router(cluster) as (service, client):
            completion = await client.generate([5, 6, 7], max_tokens=2).result()
            where = ["--endpoint", service.address]
            file = tmp_path / "trace.json"
            assert await asyncio.to_thread(main, ["trace", completion.request_id, "-o", str(file), *where]) == 0
            assert phases(file.read_text())
            capsys.readouterr()
            assert await asyncio.to_thread(main, ["trace", *where]) == 0
            printed, written = phases(capsys.readouterr().out), phases(file.read_text())
            assert [event["dur"] for event in printed] == [event["dur"] for event in written]
            assert await asyncio.to_thread(main, ["trace", "nobody", *where]) == 1
            assert "no request 'nobody'" in capsys.readouterr().err
            nowhere = ["-o", str(tmp_path / "no" / "where")]
            assert await asyncio.to_thread(main, ["trace", *nowhere, *where]) == 2

    with FakeCluster() as cluster:
        asyncio.run(scenario())
