"""gRPC bodies through the real service: every call ends well, or as the request's own fault."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.v1 import splitserve_pb2 as pb
from tests.fuzz.mutate import bounded, corpus, fuzz, mutated, seeds
from tests.router.routers import running_router

METHODS = ["Generate", "Chat", "Tokenize", "Detokenize"]
FAULTS = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
Call = Callable[[str, bytes], grpc.StatusCode]


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    """Sends bytes to a method and returns how the call ended. The router runs while a call does."""
    with FakeCluster() as cluster, asyncio.Runner() as runner:
        router = running_router(cluster)
        service, _ = runner.run(router.__aenter__())
        channel = runner.run(connected(service.address))

        def run(method: str, data: bytes) -> grpc.StatusCode:
            with bounded():
                return runner.run(outcome(channel, method, data))

        yield run
        runner.run(channel.close())
        runner.run(router.__aexit__(None, None, None))


async def connected(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address)


async def outcome(channel: grpc.aio.Channel, method: str, data: bytes) -> grpc.StatusCode:
    stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
        f"/splitserve.v1.SplitServe/{method}"
    )
    answer = stream(data, timeout=10.0)
    try:
        async for _ in answer:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return await answer.code()


@pytest.mark.parametrize("path", corpus("grpc"), ids=lambda path: path.name)
def test_corpus(call: Call, path: Path) -> None:
    expected = grpc.StatusCode.OK if "valid" in path.name else grpc.StatusCode.INVALID_ARGUMENT
    assert call(path.name.partition("-")[0], path.read_bytes()) == expected


@fuzz
@given(st.sampled_from(METHODS), mutated(seeds("grpc")))
def test_spoilt_bytes(call: Call, method: str, data: bytes) -> None:
    assert call(method, data) in FAULTS


MANY: dict[str, tuple[str, Callable[[], Message]]] = {
    "token ids": ("Generate", lambda: pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 10_000_000))),
    "ids to text": ("Detokenize", lambda: pb.DetokenizeRequest(token_ids=[1] * 10_000_000)),
    "turns": ("Chat", lambda: pb.ChatRequest(messages=[pb.Message(role="u")] * 2_000_000)),
    "a role": ("Chat", lambda: pb.ChatRequest(messages=[pb.Message(role="u" * 10_000_000)])),
    "stops": ("Generate", lambda: pb.GenerateRequest(text="a", sampling=pb.Sampling(stop=["x"] * 4_000_000))),
}


@pytest.mark.parametrize("name", MANY)
def test_many(call: Call, name: str) -> None:
    """Refused by their number, before work is done for each."""
    method, body = MANY[name]
    assert call(method, body().SerializeToString()) == grpc.StatusCode.INVALID_ARGUMENT
