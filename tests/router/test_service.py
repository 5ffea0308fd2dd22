"""The router end to end: real gRPC and real sockets, over fake engines that answer a prompt with its own tokens."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitserve.client import AsyncClient, SplitserveClientError
from splitserve.cluster.channel import CurveKeys
from splitserve.cluster.errors import StartupError
from splitserve.cluster.sampling import SamplingParams
from splitserve.router.deadline import Deadline
from splitserve.router.fair import Claim, Claimant
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.request import Chunk
from splitserve.router.service import RouterService
from splitserve.router.tenants import Tenants
from tests.router.routers import (
    CONTEXT,
    MODEL,
    eventually,
    model_folder,
    nothing_left,
    running_router,
    tokenizer,
    topology,
)

SLOW = Behaviour(step_s=0.05)

ANYBODY = Tenants(None).find(None)


def echo(token_ids: list[int], count: int, sample: int = 0) -> list[int]:
    """What the fakes answer."""
    start = len(token_ids) + sample
    return [token_ids[(start + step) % len(token_ids)] for step in range(count)]


def test_a_text_is_answered_with_usage_and_timings() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (_, client):
            stream = client.generate("the quick 🙂 fox", max_tokens=20)
            texts = [delta.text async for delta in stream]
            completion = await stream.result()
        prompt = tokenizer().encode("the quick 🙂 fox")
        assert completion.samples[0].token_ids == tuple(echo(prompt, 20))
        assert completion.text == "".join(texts) == tokenizer().decode(echo(prompt, 20))
        assert completion.samples[0].finish_reason == "length"
        summary = completion.summary
        assert (summary.usage.prompt_tokens, summary.usage.completion_tokens) == (len(prompt), 20)
        assert (summary.prefill_engine, summary.decode_engine) == ("prefill/0/0", "decode/0/0")
        timings = summary.timings
        assert timings.prefill_s == 0.05
        assert timings.kv_transfer_s == pytest.approx(0.03, abs=0.02)
        assert timings.ttft_s >= 0.05
        assert timings.decode_s == pytest.approx(18 * 0.005, abs=0.05)
        assert timings.tpot_s == pytest.approx((timings.kv_transfer_s + timings.decode_s) / 19, rel=0.01)
        assert timings.total_s >= timings.ttft_s + timings.decode_s

    with FakeCluster(behaviour=Behaviour(prefill_s=0.05, transfer_s=0.03, step_s=0.005)) as cluster:
        with nothing_left(cluster):
            asyncio.run(scenario(cluster))
        assert not any(engine.cancels for engine in cluster.engines.values())  # it ended by itself


def test_chat_samples_and_logprobs() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        messages = [{"role": "user", "content": "Hello"}]
        async with running_router(cluster) as (_, client):
            completion = await client.chat(messages, max_tokens=5, n=3, logprobs=2, prompt_logprobs=0).result()
            assert await client.tokenize(messages) == (prompt := tokenizer().encode_chat(messages))
        assert [sample.token_ids for sample in completion.samples] == [tuple(echo(prompt, 5, s)) for s in range(3)]
        assert [len(sample.logprobs) for sample in completion.samples] == [5, 5, 5]
        assert len(completion.prompt_logprobs) == len(prompt) - 1
        assert completion.summary.usage.completion_tokens == 15

    with FakeCluster() as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_shortest_answers_free_both_engines(max_tokens: int) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (_, client):
            completion = await client.generate([5, 6, 7], max_tokens=max_tokens).result()
            assert completion.samples[0].token_ids == (5, 6)[:max_tokens]
            await eventually(lambda: not any(engine.jobs for engine in cluster.engines.values()))

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))


def test_a_first_token_that_comes_after_decodes_tokens_is_put_first() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (_, client):
            completion = await client.generate([5, 6, 7], max_tokens=12).result()
        assert completion.samples[0].token_ids == (5, 6, 7) * 4
        assert completion.summary.timings.kv_transfer_s == 0.0

    with FakeCluster(behaviour=Behaviour(first_token_delay_s=0.1)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_a_stop_string_ends_its_sample_on_the_engine_and_nothing_of_it_is_shown() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (_, client):
            stream = client.generate("abc END def ", max_tokens=200, stop=["END de"], n=2)
            shown = [delta.text async for delta in stream if delta.index == 0]
            completion = await stream.result()
        assert "".join(shown) == completion.text == "abc "
        assert {sample.finish_reason for sample in completion.samples} == {"stop"}
        assert len(completion.samples[0].token_ids) < 20
        cancels = cluster.engines["decode/0/0"].cancels
        assert {cancel.sample for cancel in cancels} == {0, 1, None}

    with FakeCluster(behaviour=SLOW) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_many_requests_at_once_each_get_their_own_answer() -> None:
    async def one(client: AsyncClient, seed: int) -> None:
        rng = random.Random(seed)
        prompt = [rng.randrange(3, 350) for _ in range(rng.randrange(1, 50))]
        count, samples = rng.randrange(1, 40), rng.randrange(1, 3)
        completion = await client.generate(prompt, max_tokens=count, n=samples).result()
        for index, sample in enumerate(completion.samples):
            assert sample.token_ids == tuple(echo(prompt, count, index))
            assert sample.text == tokenizer().decode(sample.token_ids)

    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster, policy="round_robin") as (_, client):
            await asyncio.gather(*(one(client, seed) for seed in range(150)))

    with FakeCluster(2, 3, Behaviour(slots=30, prefill_s=0.003)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_cancelling_frees_both_engines_within_a_second() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (_, client):
            stream = client.generate([5, 6, 7], max_tokens=200)
            await anext(aiter(stream))
            stream.cancel()
            with pytest.raises(SplitserveClientError, match="CANCELLED"):
                await stream.result()
            await eventually(lambda: not any(engine.jobs for engine in cluster.engines.values()), within_s=1.0)
            assert (await client.status()).active_requests == 0

    with FakeCluster(behaviour=SLOW) as cluster:
        asyncio.run(scenario(cluster))


def test_tokens_merge_while_the_client_is_slow() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        chunks: list[Chunk] = []

        async def write_slowly(chunk: Chunk) -> None:
            chunks.append(chunk)
            await asyncio.sleep(0.1)

        async with running_router(cluster) as (service, _):
            await service.dispatcher.serve(
                [5, 6, 7], SamplingParams(max_tokens=200), Deadline(9.0), write_slowly, tenant=ANYBODY
            )
        token_ids = [token_id for chunk in chunks for delta in chunk.deltas for token_id in delta.token_ids]
        assert token_ids == echo([5, 6, 7], 200)
        assert len(chunks) < 20

    with FakeCluster() as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_the_routers_own_deadline_ends_a_request_that_brings_none(stage: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster, default_deadline_s=0.4) as (_, client):
            where = {"prefill": "between prefill/0/0 and decode/0/0", "decode": "decoding on decode/0/0"}[stage]
            with pytest.raises(SplitserveClientError, match=f"DEADLINE_EXCEEDED: 0.4 s passed while {where}"):
                await client.generate([5, 6, 7], max_tokens=200).result()

    behaviour = Behaviour(prefill_s=9.0) if stage == "prefill" else SLOW
    with FakeCluster(behaviour=behaviour) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_the_clients_deadline_ends_its_request() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (_, client):
            with pytest.raises(SplitserveClientError, match="DEADLINE_EXCEEDED"):
                await client.generate([5, 6, 7], max_tokens=200, timeout_s=0.3).result()
            await eventually(lambda: not any(engine.jobs for engine in cluster.engines.values()), within_s=1.0)

    with FakeCluster(behaviour=SLOW) as cluster:
        asyncio.run(scenario(cluster))


def test_requests_wait_in_line_for_busy_engines_and_are_refused_when_the_line_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster, max_queue=4) as (service, client):
            claims, claim = list[Claimant](), service.dispatcher._line.claim

            def note(claimant: Claimant) -> Claim:
                claims.append(claimant)
                return claim(claimant)

            monkeypatch.setattr(service.dispatcher._line, "claim", note)
            calls = (client.generate([5, 6, 7], max_tokens=10).result() for _ in range(12))
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert len(claims) == 4, "who is refused has claimed no share"
            refusals = [result for result in results if isinstance(result, SplitserveClientError)]
            assert len(refusals) == 12 - 4 - 4  # two slots on each of two engines, and the queue
            for refusal in refusals:
                assert refusal.code == "RESOURCE_EXHAUSTED"
                assert refusal.message == "the queue is full: 4 requests wait"
                assert refusal.retry_after_s is not None
                assert 0.1 <= refusal.retry_after_s <= 30
            await client.generate([5, 6, 7], max_tokens=10).result()

    with FakeCluster(1, 2, Behaviour(slots=2, step_s=0.02)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_who_waits_in_line_does_not_care_that_a_busy_engine_restarts() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client):
            calls = [asyncio.ensure_future(client.generate([5, 6], max_tokens=30).result()) for _ in range(4)]
            await eventually(lambda: service.dispatcher.admission.queued == 2)
            cluster.restart("decode/0/0")
            service.set_members(cluster.members)
            assert [call.samples[0].token_ids for call in await asyncio.gather(*calls)] == [tuple(echo([5, 6], 30))] * 4

    with FakeCluster(1, 2, Behaviour(slots=1, step_s=0.02)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_no_more_than_max_active_requests_reach_the_engines() -> None:
    peak = 0

    def watch(tokens: Any) -> None:
        nonlocal peak
        peak = max(peak, len(cluster.engines["decode/0/0"].jobs))

    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster, max_active=3) as (_, client):
            await asyncio.gather(*(client.generate([5, 6], max_tokens=9).result() for _ in range(10)))

    with FakeCluster(on_step=watch) as cluster:
        asyncio.run(scenario(cluster))
    assert peak == 3


def test_an_engines_failure_is_the_requests_error_and_frees_the_other_engine() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (_, client):
            with pytest.raises(SplitserveClientError, match="INTERNAL: the logits are not finite"):
                await client.generate([5, 6, 7]).result()

    behaviour = Behaviour(fail_prefill=("INTERNAL", "the logits are not finite"))
    with FakeCluster(behaviour=behaviour) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_a_colocated_engine_does_both() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster, colocated=True) as (_, client):
            completion = await client.generate([5, 6, 7], max_tokens=7).result()
            assert completion.samples[0].token_ids == (5, 6, 7, 5, 6, 7, 5)
            assert completion.summary.prefill_engine == completion.summary.decode_engine

    with FakeCluster(1, 2, colocated=True) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_curve_keys_encrypt_and_strangers_get_nothing() -> None:
    async def scenario(cluster: FakeCluster, keys: CurveKeys) -> None:
        async with running_router(cluster, keys=keys) as (_, client):
            assert (await client.generate([5], max_tokens=2).result()).samples[0].token_ids == (5, 5)
        stranger = RouterService(topology(), model_folder())
        address = await stranger.start()
        stranger.set_members(cluster.members)
        await asyncio.sleep(0.3)
        async with AsyncClient(address) as client:
            assert {engine.state for engine in (await client.status()).engines} == {"starting"}
        await stranger.stop()

    keys = CurveKeys.generate()
    with FakeCluster(keys=keys) as cluster:
        asyncio.run(scenario(cluster, keys))


def test_health_follows_the_engines_and_status_tells_about_them() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client), grpc.aio.insecure_channel(service.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service="splitserve.v1.SplitServe"))
            seen: list[int] = []
            async for response in watch:
                if not seen or seen[-1] != response.status:
                    seen.append(response.status)
                if seen[-1] == health_pb2.HealthCheckResponse.SERVING:
                    service.set_members(cluster.members[:1])
                elif len(seen) > 1 and seen[-2] == health_pb2.HealthCheckResponse.SERVING:
                    break
            assert not await client.healthy()
            status = await client.status()
            assert (status.cluster, status.model) == ("test", MODEL)
            assert [(engine.name, engine.role) for engine in status.engines] == [("prefill/0/0", "prefill")]
            (model,) = await client.models()
            assert (model.name, model.context, model.vocab_size) == (MODEL, CONTEXT, tokenizer().vocab_size)

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))


def test_a_port_in_use_is_named() -> None:
    async def scenario() -> None:
        service = RouterService(shared := topology(), model_folder())
        await service.start()
        with pytest.raises(StartupError, match=f"router.grpc: cannot listen on {shared.router.grpc}"):
            await RouterService(shared, model_folder()).start()
        await service.stop()

    asyncio.run(scenario())
