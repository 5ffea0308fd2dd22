"""The clients against a real router over fake engines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from splitserve.client import AsyncClient, Client, SplitserveClientError
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.service import RouterService
from tests.router.routers import MODEL, engines_ready, eventually, model_folder, running_router, tokenizer, topology


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(behaviour=Behaviour(step_s=0.01)) as fakes:
        yield fakes


@pytest.fixture(scope="module")
def client(cluster: FakeCluster) -> Iterator[Client]:
    """A sync client of a router that runs in a thread, as it does in a Ray actor."""
    address: list[str] = []
    loop = asyncio.new_event_loop()
    stopping = asyncio.Event()

    async def serve() -> None:
        service = RouterService(topology(), model_folder())
        service.set_members(cluster.members)
        started = await service.start()
        async with AsyncClient(started) as probe:
            await engines_ready(probe)
        address.append(started)
        await stopping.wait()
        await service.stop()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    asyncio.run(eventually(lambda: address, within_s=5.0))
    with Client(address[0]) as connected:
        yield connected
    loop.call_soon_threadsafe(stopping.set)
    thread.join()
    loop.close()


def test_a_stream_is_read_in_parts_or_taken_whole(client: Client) -> None:
    stream = client.generate("the quick fox", max_tokens=12, logprobs=0)
    assert stream.request_id == ""
    first = next(iter(stream))
    completion = stream.result()
    assert stream.request_id == completion.request_id != ""
    assert first.token_ids == completion.samples[0].token_ids[: len(first.token_ids)]
    assert len(completion.samples[0].token_ids) == len(completion.samples[0].logprobs) == 12
    assert completion.samples == client.generate("the quick fox", max_tokens=12, logprobs=0).result().samples


def test_chat_tokenize_models_and_status(client: Client) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    prompt = client.tokenize(messages)
    completion = client.chat(messages, max_tokens=4, model=MODEL).result()
    assert completion.samples[0].token_ids == tuple(prompt[:4])
    assert completion.summary.usage.prompt_tokens == len(prompt)
    assert client.detokenize(client.tokenize("the fox")) == "the fox"
    (model,) = client.models()
    assert (model.name, model.vocab_size) == (MODEL, tokenizer().vocab_size)
    status = client.status(timeout_s=5.0)
    assert [engine.state for engine in status.engines] == ["ready", "ready"]
    assert status.version
    assert client.healthy(timeout_s=5.0)


def test_every_sampling_parameter_arrives(
    client: Client, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling: dict[str, Any] = {
        "max_tokens": 3,
        "min_tokens": 1,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.75,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {3: -1.0},
        "seed": -9,
        "n": 2,
        "stop": ["never to be seen"],
        "stop_token_ids": [7],
        "ignore_eos": True,
        "logprobs": 4,
        "prompt_logprobs": 5,
    }
    seen: list[Any] = []
    engine = cluster.engines["decode/0/0"]

    def join(key: tuple[str, int]) -> None:
        seen.append(engine.jobs[key].message.params)
        type(engine).join(engine, key)

    monkeypatch.setattr(engine, "join", join)
    client.generate([5, 6], **sampling).result()
    expected = sampling | {"stop": ("never to be seen",), "stop_token_ids": (7,), "grammar": None}
    assert [vars(params) for params in seen] == [expected]


def test_errors_carry_code_and_message(client: Client) -> None:
    with pytest.raises(SplitserveClientError, match="NOT_FOUND: model: found 'other'") as caught:
        client.tokenize("x", model="other")
    assert (caught.value.code, caught.value.retry_after_s) == ("NOT_FOUND", None)
    with pytest.raises(SplitserveClientError, match="DEADLINE_EXCEEDED"):
        client.generate([5], max_tokens=200, timeout_s=0.2).result()


def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client):
            assert await client.tokenize("the fox")
            with Client(service.address) as sync:
                assert await asyncio.to_thread(sync.tokenize, "the fox")

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))


def test_cancelling_a_sync_stream_ends_it(client: Client, cluster: FakeCluster) -> None:
    stream = client.generate([5], max_tokens=200)
    next(iter(stream))
    stream.cancel()
    with pytest.raises(SplitserveClientError, match="CANCELLED"):
        stream.result()
    asyncio.run(eventually(lambda: not cluster.engines["decode/0/0"].jobs, within_s=1.0))


def test_a_dropped_async_stream_ends_its_request() -> None:
    async def scenario() -> None:
        with FakeCluster(behaviour=Behaviour(step_s=0.02)) as cluster:
            async with running_router(cluster) as (service, client):
                async for _ in client.generate("the fox", max_tokens=200):
                    break
                await eventually(lambda: service.dispatcher.admission.active == 0)

    asyncio.run(scenario())


def test_cancelling_the_task_that_reads_cancels_the_request() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (_, client):
            reading = asyncio.ensure_future(client.generate([5], max_tokens=200).result())
            await eventually(lambda: cluster.engines["decode/0/0"].decoding)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await eventually(lambda: not cluster.engines["decode/0/0"].jobs, within_s=1.0)

    with FakeCluster(behaviour=Behaviour(step_s=0.02)) as cluster:
        asyncio.run(scenario(cluster))
