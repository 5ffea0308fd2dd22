"""Requests whose engines die, restart, freeze or lose their KV go on elsewhere: no token twice, none missing."""

from __future__ import annotations

import asyncio
import random
import re
from contextlib import AsyncExitStack

import grpc
import pytest

from splitserve.client import AsyncClient, SplitserveClientError
from splitserve.cluster.messages import Granted, SendTo
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.request import MOST_LOSSES
from splitserve.router.service import RouterService
from splitserve.router.v1 import splitserve_pb2 as pb
from splitserve.router.v1.splitserve_pb2_grpc import SplitServeStub
from tests.router.routers import engines_ready, eventually, model_folder, nothing_left, running_router, topology
from tests.router.test_service import echo


@pytest.mark.parametrize("told", ["by silence", "by membership"])
def test_a_killed_decodes_requests_go_on_with_another(told: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster, worker_timeout_s=0.5, policy="round_robin") as (service, client):
            streams = [client.generate([5, 6, 7], max_tokens=60, n=1 + index % 2) for index in range(4)]
            reading = [asyncio.ensure_future(stream.result()) for stream in streams]
            await eventually(lambda: len(cluster.engines["decode/0/0"].decoding) == 2)
            cluster.kill("decode/0/0")
            if told == "by membership":
                service.set_members(cluster.members)
            for index, completion in enumerate(await asyncio.gather(*reading)):
                found = [sample.token_ids for sample in completion.samples]
                assert found == [tuple(echo([5, 6, 7], 60, sample)) for sample in range(1 + index % 2)]
                assert completion.summary.decode_engine == "decode/1/0"

    with FakeCluster(1, 2, Behaviour(step_s=0.01)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


@pytest.mark.parametrize("engine", ["prefill/0/0", "decode/0/0"])
def test_with_one_worker_a_pool_they_wait_until_it_is_back(engine: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client):
            reading = [asyncio.ensure_future(client.generate([5, 6, 7], max_tokens=40).result()) for _ in range(3)]
            await eventually(lambda: len(cluster.engines[engine].jobs) == 3)
            members = cluster.members
            service.set_members([member for member in members if member.engine != engine])
            reading.append(asyncio.ensure_future(client.generate([5, 6, 7], max_tokens=40).result()))
            cluster.restart(engine)
            await asyncio.sleep(0.2)
            service.set_members(cluster.members)
            for completion in await asyncio.gather(*reading):
                assert completion.samples[0].token_ids == tuple(echo([5, 6, 7], 40))

    with FakeCluster(behaviour=Behaviour(prefill_s=0.5, step_s=0.01)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_without_workers_a_request_waits_for_its_deadline_and_says_why() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster, default_deadline_s=1.0) as (service, client):
            service.set_members([])
            with pytest.raises(SplitserveClientError, match="not all pools have a worker that is ready") as caught:
                await client.generate([5]).result()
            assert caught.value.code == "DEADLINE_EXCEEDED"
            service.set_members(cluster.members)
            await engines_ready(client)
            assert (await client.generate([5], max_tokens=3).result()).samples[0].token_ids == (5, 5, 5)

    with FakeCluster() as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_an_engine_that_is_away_for_a_moment_is_heard_again() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client):
            for _ in range(20):
                service.set_members([])
                service.set_members(cluster.members)
                stream = client.generate([5], max_tokens=3, timeout_s=5)
                assert (await stream.result()).samples[0].token_ids == (5, 5, 5)

    with FakeCluster() as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_stop_strings_and_logprobs_hold_across_a_loss() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client):
            undisturbed = await client.generate("abcdefghij", max_tokens=60, logprobs=0, stop=["ijab"]).result()
            stream = client.generate("abcdefghij", max_tokens=60, logprobs=0, stop=["ijab"])
            reading = asyncio.ensure_future(stream.result())
            await eventually(lambda: cluster.engines["decode/0/0"].decoding)
            cluster.restart("decode/0/0")
            service.set_members(cluster.members)
            disturbed = await reading
            assert disturbed.samples == undisturbed.samples
            assert disturbed.samples[0].finish_reason == "stop"

    with FakeCluster(behaviour=Behaviour(step_s=0.01)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_a_death_counts_once_however_many_samples_it_hits() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client):
            reading = asyncio.ensure_future(client.generate([5, 6, 7], max_tokens=60, n=16).result())
            for _ in range(2):
                await eventually(
                    lambda: sum(len(job.live) for job in cluster.engines["decode/0/0"].decoding.values()) == 16
                )
                cluster.restart("decode/0/0")
                service.set_members(cluster.members)
            completion = await reading
            found = [sample.token_ids for sample in completion.samples]
            assert found == [tuple(echo([5, 6, 7], 60, sample)) for sample in range(16)]
            assert completion.summary.losses == 2

    with FakeCluster(behaviour=Behaviour(step_s=0.02)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_a_request_that_brings_its_workers_down_is_given_up() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (_, client):
            with pytest.raises(SplitserveClientError, match=f"ABORTED: given up after {MOST_LOSSES} losses"):
                await client.generate([5, 6, 7]).result()

    behaviour = Behaviour(fail_prefill=("UNAVAILABLE", "no KV came through"))
    with FakeCluster(behaviour=behaviour) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


async def two_routers(cluster: FakeCluster, stack: AsyncExitStack) -> tuple[list[RouterService], AsyncClient]:
    services = [RouterService(topology(), model_folder()) for _ in range(2)]
    for service in services:
        await service.start()
        service.set_members(cluster.members)
        stack.push_async_callback(service.stop)
    client = await stack.enter_async_context(AsyncClient([service.address for service in services]))
    await eventually(lambda: all(service.dispatcher.ready for service in services))
    return services, client


@pytest.mark.parametrize("begun", [True, False])
def test_a_stream_whose_router_dies_goes_on_at_another(begun: bool) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with AsyncExitStack() as stack:
            services, client = await two_routers(cluster, stack)
            undisturbed = await client.generate("abcdefghij", max_tokens=60, n=2, logprobs=0, stop=["ijab"]).result()
            await eventually(lambda: not any(engine.jobs for engine in cluster.engines.values()))
            stream = client.generate("abcdefghij", max_tokens=60, n=2, logprobs=0, stop=["ijab"], timeout_s=20)
            reading = asyncio.ensure_future(stream.result())
            held = cluster.engines["decode/0/0"].decoding if begun else cluster.engines["prefill/0/0"].jobs
            await eventually(lambda: held)
            (busy,) = [service for service in services if service.dispatcher.admission.active]
            await busy._server.stop(0)
            completion = await reading
            assert completion.samples == undisturbed.samples
            assert completion.request_id.partition("-")[2] != undisturbed.request_id

    with FakeCluster(behaviour=Behaviour(prefill_s=0.05, step_s=0.01)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


@pytest.mark.parametrize("finish_reason", [pb.FINISH_REASON_UNSPECIFIED, pb.FINISH_REASON_STOP])
def test_what_the_client_has_does_not_come_again(finish_reason: pb.FinishReason.ValueType) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, _), grpc.aio.insecure_channel(service.address) as channel:
            request = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=[5, 6, 7]),
                sampling=pb.Sampling(max_tokens=9, n=2),
                answered=[pb.Answered(token_ids=echo([5, 6, 7], 4), finish_reason=finish_reason), pb.Answered()],
            )
            found: dict[int, list[int]] = {0: [], 1: []}
            async for response in SplitServeStub(channel).Generate(request):
                for delta in response.deltas:
                    found[delta.index] += delta.token_ids
            rest = [] if finish_reason else echo([5, 6, 7], 9)[4:]
            assert found == {0: rest, 1: echo([5, 6, 7], 9, 1)}
            assert response.summary.usage.completion_tokens == 4 + len(rest) + 9

    with FakeCluster() as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


async def end_of(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]) -> str:
    try:
        return "OK" if [response async for response in call][-1].HasField("summary") else "cut short"
    except grpc.aio.AioRpcError as error:
        return error.code().name


def test_what_goes_on_is_not_refused_by_a_full_queue_and_has_no_first_token_here() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with (
            running_router(cluster, max_active=1, max_queue=1) as (service, client),
            grpc.aio.insecure_channel(service.address) as channel,
        ):
            running = [asyncio.ensure_future(client.generate([5, 6], max_tokens=40).result())]
            await eventually(lambda: cluster.engines["decode/0/0"].decoding)
            running.append(asyncio.ensure_future(client.generate([5, 6], max_tokens=2).result()))
            await eventually(lambda: service.dispatcher.admission.queued == 1)
            with pytest.raises(SplitserveClientError, match="the queue is full"):
                await client.generate([5, 6], max_tokens=2).result()
            request = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=[5, 6, 7]),
                sampling=pb.Sampling(max_tokens=9),
                answered=[pb.Answered(token_ids=echo([5, 6, 7], 4))],
            )
            *chunks, last = [response async for response in SplitServeStub(channel).Generate(request)]
            assert sum(len(delta.token_ids) for chunk in chunks for delta in chunk.deltas) == 5
            timings = last.summary.timings
            assert timings.ttft_s == 0.0
            assert 0.005 < timings.tpot_s < 0.1
            await asyncio.gather(*running)
            running = [asyncio.ensure_future(client.generate([5, 6], max_tokens=40).result())]
            await eventually(lambda: cluster.engines["decode/0/0"].decoding)
            several = [SplitServeStub(channel).Generate(request) for _ in range(4)]
            ended = await asyncio.gather(*(end_of(call) for call in several))
            assert sorted(ended) == ["OK"] * 2 + ["RESOURCE_EXHAUSTED"] * 2, (
                "any client may say that it goes on: that has a bound, too"
            )
            await asyncio.gather(*running)
            assert service.dispatcher.recent.latencies().ttft.p50_s > 0.0
            count = "splitserve_time_to_first_token_seconds_count"
            assert service.dispatcher.metrics.registry.get_sample_value(count) == 3

    with FakeCluster(behaviour=Behaviour(step_s=0.01)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


@pytest.mark.parametrize(
    ("answered", "fault"),
    [
        ([pb.Answered()] * 3, "answered: found '3 samples'; give none, or all 2"),
        ([pb.Answered(token_ids=[10**6]), pb.Answered()], "answered.0..token_ids: found 1000000"),
        ([pb.Answered(), pb.Answered(token_ids=[5] * 9)], "answered.1..token_ids: found '9 tokens'"),
    ],
)
def test_what_cannot_have_been_answered_is_refused(answered: list[pb.Answered], fault: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, _), grpc.aio.insecure_channel(service.address) as channel:
            sampling = pb.Sampling(max_tokens=9, n=2)
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), sampling=sampling, answered=answered)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await SplitServeStub(channel).Generate(request).read()
            assert re.match(fault, caught.value.details() or "")

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))


def test_an_attempt_that_is_lost_just_when_it_is_granted_has_its_kv_sent_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client):
            engines, sent = service.dispatcher.engines, list[int]()
            hear, send = engines._on_message, engines.send

            def lose_the_first(engine: str, message: object) -> None:
                hear(engine, message)
                if isinstance(message, Granted) and message.attempt == 1:
                    service.dispatcher._on_lost(engine, "seems gone")

            def note(name: str, message: object) -> None:
                sent.extend([message.attempt] if isinstance(message, SendTo) else [])
                send(name, message)

            monkeypatch.setattr(engines, "_on_message", lose_the_first)
            monkeypatch.setattr(engines, "send", note)
            completion = await client.generate([5, 6, 7], max_tokens=9).result()
            assert completion.samples[0].token_ids == tuple(echo([5, 6, 7], 9))
            assert sent == [2]

    with FakeCluster() as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


@pytest.mark.parametrize("seed", range(4))
def test_many_requests_under_many_deaths(seed: int) -> None:
    """Engines of both pools are replaced at random moments; each is away for a while."""

    async def scenario(cluster: FakeCluster) -> None:
        dice = random.Random(seed)
        async with running_router(cluster) as (service, client):
            prompts = [dice.choices(range(3, 250), k=dice.randint(1, 9)) for _ in range(40)]
            samples = [dice.randint(1, 3) for _ in prompts]
            reading = [
                asyncio.ensure_future(client.generate(prompt, max_tokens=50, n=n, timeout_s=30).result())
                for prompt, n in zip(prompts, samples, strict=True)
            ]
            for _ in range(6):
                await asyncio.sleep(dice.uniform(0.02, 0.15))
                name = dice.choice(sorted(cluster.engines))
                service.set_members([member for member in cluster.members if member.engine != name])
                cluster.restart(name)
                await asyncio.sleep(dice.uniform(0.0, 0.1))
                service.set_members(cluster.members)
            for prompt, n, completion in zip(prompts, samples, await asyncio.gather(*reading), strict=True):
                found = [sample.token_ids for sample in completion.samples]
                assert found == [tuple(echo(prompt, 50, sample)) for sample in range(n)]

    behaviour = Behaviour(prefill_s=0.02, transfer_s=0.01, step_s=0.01, slots=30)
    with FakeCluster(2, 2, behaviour) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))
