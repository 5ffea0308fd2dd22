"""What Prometheus finds at a router: the truth about requests and engines, in its own formats, at a bounded size."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx2
import pytest
from prometheus_client import CollectorRegistry, Histogram, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import Collector

from splitserve.client import AsyncClient, SplitserveClientError
from splitserve.cluster.errors import SplitserveError
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.metrics import TOKEN_SECONDS, LeanHistogram, outcome
from splitserve.router.service import RouterService
from tests.router.routers import MODEL, eventually, running_router

OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0"}
SECRET = "swordfish swordfish"


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text: str, *, openmetrics: bool = False) -> None:
        parse = parse_openmetrics if openmetrics else parse_text
        self.text = text
        self.families = {family.name: family for family in parse(text)}

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of all samples with these labels."""
        return sum(
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == f"splitserve_{name}" and labels.items() <= sample.labels.items()
        )

    @property
    def names(self) -> set[str]:
        return {sample.name for family in self.families.values() for sample in family.samples}

    @property
    def series(self) -> int:
        return sum(len(family.samples) for family in self.families.values())


async def scrape(service: RouterService, headers: dict[str, str] | None = None) -> Scrape:
    async with httpx2.AsyncClient() as http:
        response = await http.get(f"http://{service.http_address}/metrics", headers=headers)
    assert response.status_code == 200
    return Scrape(response.text, openmetrics=headers is OPENMETRICS)


def test_an_answered_request_is_counted_and_each_of_its_phases_measured() -> None:
    async def scenario() -> None:
        async with running_router(cluster) as (service, client):
            await client.generate([5, 6, 7], max_tokens=20, n=2).result()
            await asyncio.sleep(1.2)  # the next stats of engines
            found = await scrape(service)
        assert found("requests_total", code="OK") == 1
        assert found("calls_total", surface="grpc", method="Generate", code="OK") == 1
        assert found("attempts_total", reason="new") == 1
        for phase in (
            "time_to_first_token", "time_per_output_token", "queue", "prefill_queue", "prefill", "kv_transfer",
            "decode", "request",
        ):  # fmt: skip
            assert found(f"{phase}_seconds_count") == 1, phase
        assert found("prefill_seconds_sum") == pytest.approx(0.05)
        assert found("kv_transfer_seconds_sum") == pytest.approx(0.03, abs=0.02)
        assert 0.05 <= found("time_to_first_token_seconds_sum") <= found("request_seconds_sum") < 2
        assert found("inter_token_latency_seconds_count") == 19, "two samples of one step are one gap"
        assert found("request_output_tokens_sum") == 40
        assert found("request_prompt_tokens_sum") == 3
        assert found("engine_output_tokens_total", pool="prefill", engine="prefill/0/0") == 2
        assert found("engine_output_tokens_total", pool="decode", engine="decode/0/0") == 38
        assert found("engine_decode_steps_total") == 19
        assert found("kv_transfers_completed_total", transport="memory", pool="prefill") == 1
        assert (found("engine_ready"), found("ready")) == (2, 1)

    with FakeCluster(behaviour=Behaviour(prefill_s=0.05, transfer_s=0.03, step_s=0.005)) as cluster:
        asyncio.run(scenario())


async def refused(client: AsyncClient, deadline_s: float | None = None) -> str:
    with pytest.raises(SplitserveClientError) as caught:
        await client.generate([5, 6, 7], max_tokens=50, timeout_s=deadline_s).result()
    return str(caught.value.code)


def test_outcomes_have_their_codes() -> None:
    async def scenario() -> None:
        async with running_router(cluster, max_active=1, max_queue=1) as (service, client):
            first = asyncio.ensure_future(client.generate([5, 6, 7], max_tokens=100).result())
            await eventually(lambda: service.dispatcher.admission.active == 1)
            waiting = asyncio.ensure_future(client.generate([5, 6, 7], max_tokens=100).result())
            await eventually(lambda: service.dispatcher.admission.queued == 1)
            found = await scrape(service)
            assert (found("requests_active"), found("requests_queued")) == (1, 1)
            assert (found("requests_active_limit"), found("requests_queued_limit")) == (1, 1)
            assert await refused(client) == "RESOURCE_EXHAUSTED"
            waiting.cancel()
            first.cancel()
            await eventually(lambda: service.dispatcher.admission.active == 0)
            assert await refused(client, 0.2) == "DEADLINE_EXCEEDED"
            with pytest.raises(SplitserveClientError):
                await client.generate([5], max_tokens=-1).result()
            await asyncio.sleep(0.1)
            found = await scrape(service)
        assert found("requests_total", code="RESOURCE_EXHAUSTED") == 1
        assert found("requests_total", code="CANCELLED") + found("requests_total", code="DEADLINE_EXCEEDED") == 3
        assert found("requests_total") == 4, "what is no valid request never was one"
        assert found("calls_total", method="Generate", code="INVALID_ARGUMENT") == 1
        assert found("requests_active") == 0

    with FakeCluster(behaviour=Behaviour(step_s=0.05)) as cluster:
        asyncio.run(scenario())


def test_attempts_tell_why_they_were_made() -> None:
    async def scenario() -> None:
        async with running_router(cluster, worker_timeout_s=0.5, policy="round_robin") as (service, client):
            running = asyncio.ensure_future(client.generate([5, 6, 7], max_tokens=60).result())
            await eventually(lambda: len(cluster.engines["decode/0/0"].decoding) == 1)
            cluster.kill("decode/0/0")
            await running
            found = await scrape(service)
            assert (found("attempts_total", reason="new"), found("attempts_total", reason="engine_lost")) == (1, 1)
            assert (found("engine_ready", engine="decode/0/0"), found("ready")) == (0, 1)
            service.set_members(cluster.members)
            await eventually(lambda: len(list(service.dispatcher.engines)) == 2)
            assert "decode/0/0" not in (await scrape(service)).text, "who is gone leaves no series behind"
            service.set_members([])
            await eventually(lambda: not list(service.dispatcher.engines))
            assert (await scrape(service))("ready") == 0, "nor may an alert vanish with them"

    with FakeCluster(1, 2, Behaviour(step_s=0.01)) as cluster:
        asyncio.run(scenario())


def test_what_has_never_happened_counts_0() -> None:
    async def scenario() -> None:
        async with running_router(cluster) as (service, _):
            found = await scrape(service)
        for series in ('attempts_total{reason="engine_lost"} 0.0', 'requests_total{code="UNAVAILABLE"} 0.0'):
            assert f"splitserve_{series}" in found.text

    with FakeCluster() as cluster:
        asyncio.run(scenario())


def test_refusals_and_failures_are_reasons_too() -> None:
    async def busy() -> None:
        async with running_router(full) as (service, client):
            await asyncio.gather(*(client.generate([5, 6, 7], max_tokens=9).result() for _ in range(2)))
            found = await scrape(service)
            assert found("attempts_total", reason="new") == 2
            assert found("attempts_total", reason="busy") >= 1

    with FakeCluster(behaviour=Behaviour(slots=1)) as full:
        asyncio.run(busy())

    async def failing() -> None:
        async with running_router(broken) as (service, client):
            with suppress(SplitserveClientError):
                await client.generate([5, 6, 7], timeout_s=2.0).result()
            assert (await scrape(service))("attempts_total", reason="failed") >= 1

    with FakeCluster(behaviour=Behaviour(fail_prefill=("UNAVAILABLE", "no way"))) as broken:
        asyncio.run(failing())


def test_both_formats_hold_the_same_metrics() -> None:
    async def scenario() -> None:
        async with running_router(cluster) as (service, client):
            await client.generate([5, 6, 7]).result()
            text, openmetrics = await scrape(service), await scrape(service, OPENMETRICS)
        assert text.names == openmetrics.names
        assert openmetrics.text.endswith("# EOF\n")
        assert text("build_info", model=MODEL, cluster="test") == 1

    with FakeCluster() as cluster:
        asyncio.run(scenario())


def test_requests_cannot_add_series_nor_text() -> None:
    async def scenario() -> None:
        async with running_router(cluster) as (service, client):
            for warm in ("/v1/completions", "/nowhere"):
                await client.generate(SECRET, max_tokens=2).result()
                await scrape(service)
                async with httpx2.AsyncClient(base_url=f"http://{service.http_address}") as http:
                    await http.post(warm, json={"prompt": SECRET, "max_tokens": 2})
                    await http.post("/v1/completions", json={"prompt": 5})
                    await http.get("/v1/models/x")
            before = await scrape(service)
            async with httpx2.AsyncClient(base_url=f"http://{service.http_address}") as http:
                for index in range(40):
                    await http.post(f"/{SECRET}/{index}", json={})
                    await http.get(f"/v1/models/{SECRET}{index}")
                    body = {"prompt": f"{SECRET} {index}", "user": f"{SECRET}{index}", "max_tokens": 1 + index % 3}
                    await http.post("/v1/completions", json=body, headers={"user-agent": f"{SECRET}{index}"})
                    await http.post("/v1/completions", json={"prompt": 5, f"key{index}": SECRET})
                    await http.request(f"BREW{index}", "/metrics")
            after = await scrape(service)
        assert after("calls_total") > before("calls_total") + 150
        assert after.series - before.series <= 1, "the method that is none of HTTP's gets a status of its own"
        assert SECRET.split()[0] not in after.text

    with FakeCluster() as cluster:
        asyncio.run(scenario())


def test_a_status_that_is_none_counts_as_internal() -> None:
    codes: list[str] = []
    error = SplitserveError("an engine says so")
    error.code = "MADE_UP"
    with pytest.raises(SplitserveError), outcome(codes.append):
        raise error
    with pytest.raises(ZeroDivisionError), outcome(codes.append):
        print(1 / 0)
    assert codes == ["INTERNAL", "INTERNAL"]


def test_a_histogram_counts_as_the_librarys_does() -> None:
    ours = LeanHistogram("gap_seconds", "Gaps.", TOKEN_SECONDS)
    theirs = Histogram("gap_seconds", "Gaps.", buckets=TOKEN_SECONDS, registry=CollectorRegistry())
    for value in [0.0, 0.001, 0.0011, *TOKEN_SECONDS, 2.6, 1e9]:
        ours.observe(value)
        theirs.observe(value)

    def samples(families: Iterator[Any]) -> list[tuple[str, dict[str, str], float]]:
        return [
            (sample.name, sample.labels, float(sample.value))
            for family in families
            for sample in family.samples
            if not sample.name.endswith("_created")
        ]

    assert sorted(map(str, samples(ours.collect()))) == sorted(map(str, samples(iter(theirs.collect()))))


class _Witness(Collector):
    """Notes which threads collect, and how many do at once."""

    def __init__(self) -> None:
        self.threads: set[int] = set()
        self.at_once, self.most_at_once = 0, 0

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> list[Metric]:
        self.threads.add(threading.get_ident())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(0.05)
        self.at_once -= 1
        return []


def test_scrapes_leave_the_loop_to_streams_and_follow_one_another() -> None:
    async def scenario() -> None:
        async with running_router(cluster) as (service, _):
            witness = _Witness()
            service.dispatcher.metrics.registry.register(witness)
            await asyncio.gather(*(scrape(service) for _ in range(4)))
        assert threading.get_ident() not in witness.threads
        assert witness.most_at_once == 1

    with FakeCluster() as cluster:
        asyncio.run(scenario())
