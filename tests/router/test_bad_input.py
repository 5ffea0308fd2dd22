"""What is wrong with a request is said clearly, and hurts nobody else."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import pytest

from splitserve.client import AsyncClient, SplitserveClientError
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.v1 import splitserve_pb2 as pb
from tests.router.routers import CONTEXT, running_router, tokenizer

GOOD: dict[str, Any] = {"prompt": "the fox", "max_tokens": 2}
HIGHEST = tokenizer().vocab_size - 1

CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "gpt-5"}, "NOT_FOUND", "model: found 'gpt-5'; this cluster serves 'tiny'"),
    ({"prompt": ""}, "INVALID_ARGUMENT", "text: found ''; give at least one character"),
    ({"prompt": []}, "INVALID_ARGUMENT", "prompt: found 'no tokens'; give at least one token"),
    ({"prompt": [1, -1]}, "INVALID_ARGUMENT", f"token_ids: found -1; give token ids from 0 to {HIGHEST}"),
    ({"prompt": [1, HIGHEST + 1]}, "INVALID_ARGUMENT", f"token_ids: found {HIGHEST + 1}; "),
    ({"prompt": [1] * CONTEXT}, "INVALID_ARGUMENT", f"prompt: found '{CONTEXT} tokens'; the context holds {CONTEXT}"),
    ({"prompt": "a" * 10**6}, "INVALID_ARGUMENT", "text: found '1000000 characters'; the context holds"),
    ({"max_tokens": CONTEXT}, "INVALID_ARGUMENT", f"max_tokens: found {CONTEXT}; after "),
    ({"max_tokens": 0}, "INVALID_ARGUMENT", "max_tokens: found 0"),
    ({"min_tokens": 3}, "INVALID_ARGUMENT", "min_tokens: found 3; give a value from 0 to 2"),
    ({"temperature": -0.1}, "INVALID_ARGUMENT", "temperature: found -0.1"),
    ({"temperature": float("nan")}, "INVALID_ARGUMENT", "temperature: found nan"),
    ({"top_k": -1}, "INVALID_ARGUMENT", "top_k: found -1"),
    ({"top_p": 0.0}, "INVALID_ARGUMENT", "top_p: found 0.0; give a value above 0 to 1"),
    ({"min_p": 1.5}, "INVALID_ARGUMENT", "min_p: found 1.5"),
    ({"repetition_penalty": 0.0}, "INVALID_ARGUMENT", "repetition_penalty: found 0.0"),
    ({"n": 65}, "INVALID_ARGUMENT", "n: found 65; give a value from 1 to 64"),
    ({"stop": ["x"] * 17}, "INVALID_ARGUMENT", "stop: found '17 entries'; give at most 16"),
    ({"stop": [""]}, "INVALID_ARGUMENT", "stop: found ''; give strings of 1 to"),
    ({"stop_token_ids": [HIGHEST + 1]}, "INVALID_ARGUMENT", "stop_token_ids: found"),
    ({"logit_bias": {1: 1000.0}}, "INVALID_ARGUMENT", "logit_bias: found 1000.0"),
    ({"logprobs": 21}, "INVALID_ARGUMENT", "logprobs: found 21"),
    ({"cache_salt": "x" * 257}, "INVALID_ARGUMENT", "cache_salt: found '257 characters'; give at most 256"),
    ({"cache_salt": "\ud800"}, "INVALID_ARGUMENT", "surrogate"),
    ({"prompt": "\ud800"}, "INVALID_ARGUMENT", "surrogate"),
    ({"temperature": "hot"}, "INVALID_ARGUMENT", "hot|must be real number|bad argument type"),
    ({"temprature": 1.0}, "INVALID_ARGUMENT", "temprature"),
]


def test_every_fault_is_named_while_another_request_goes_on() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (_, client):
            other = asyncio.ensure_future(client.generate([5, 6, 7], max_tokens=100).result())
            for change, code, message in CASES:
                with pytest.raises(SplitserveClientError, match=message) as caught:
                    await client.generate(**GOOD | change).result()
                assert caught.value.code == code
            assert (await other).samples[0].finish_reason == "length"
            await client.generate(**GOOD).result()

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages: found \\[\\]; give at least one message"),
        ([{"role": "", "content": "x"}], "messages\\[0\\].role: found ''"),
        ([{"role": "user", "content": "x" * 10**6}], "messages: found '1000004 characters'"),
        ([{"role": "user", "text": "x"}], "text"),
    ],
)
def test_bad_conversations(messages: list[dict[str, str]], complaint: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (_, client):
            with pytest.raises(SplitserveClientError, match=f"INVALID_ARGUMENT: .*{complaint}"):
                await client.chat(messages).result()

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))


async def raw(channel: grpc.aio.Channel, method: str, data: bytes) -> grpc.aio.AioRpcError | None:
    """Send `data` as it is. The error, or None if there was none."""
    method_call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
        f"/splitserve.v1.SplitServe/{method}"
    )
    try:
        async for _ in method_call(data, timeout=5.0):
            pass
    except grpc.aio.AioRpcError as error:
        return error
    return None


def test_bytes_that_are_no_request_are_refused_and_the_router_lives() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client):
            async with grpc.aio.insecure_channel(service.address) as channel:
                invalid_utf8 = pb.GenerateRequest(text="abcd").SerializeToString().replace(b"abcd", b"ab\xff\xfe")
                error = await raw(channel, "Generate", invalid_utf8)
                assert error is not None
                assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert "send a GenerateRequest whose strings are all valid UTF-8" in str(error.details())
                error = await raw(channel, "Generate", b"\x12" + b"\xff" * 17_000_000)
                assert error is not None
                assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                error = await raw(channel, "Generate", b"")
                assert error is not None
                assert error.details() == "prompt: found None; give text or token_ids"
                await fuzz(channel)
            await client.generate(**GOOD).result()

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))


async def fuzz(channel: grpc.aio.Channel) -> None:
    """Mutated requests end well or as the request's own fault."""
    allowed = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    refused = 0
    for seed in range(300):
        rng = random.Random(seed)
        sampling = pb.Sampling(max_tokens=3, temperature=0.5, stop=["x"], logit_bias={1: 1.0})
        method, request = rng.choice(
            [
                ("Generate", pb.GenerateRequest(text="the fox", sampling=sampling)),
                ("Chat", pb.ChatRequest(messages=[pb.Message(role="user", content="hi")], sampling=sampling)),
            ]
        )
        data = bytearray(request.SerializeToString())
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        error = await raw(channel, method, bytes(data))
        assert error is None or error.code() in allowed, (seed, error)
        refused += error is not None
    assert 50 < refused < 300


def test_an_unreachable_router_is_an_error_with_a_code() -> None:
    async def scenario() -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            with pytest.raises(SplitserveClientError, match="UNAVAILABLE"):
                await client.status(timeout_s=2.0)

    asyncio.run(scenario())
