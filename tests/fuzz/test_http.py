"""HTTP bodies and heads through the real service: every request gets an answer, and a fault of its own is a 4xx."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.router import http_body, http_protocol
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from tests.fuzz.mutate import bounded, changed, corpus, fuzz, mutated, seeds
from tests.router.routers import running_router

PATHS = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
}
FAULTS = {200, 400, 404}
HEADS = [
    b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-x\r\nconnection: close\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 15\r\nx-request-timeout: 5\r\nconnection: close\r\n\r\n"
    b'{"prompt": "a"}',
    b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\nexpect: 100-continue\r\n"
    b'connection: close\r\n\r\nf;a=b\r\n{"prompt": "a"}\r\n0\r\nt: x\r\n\r\n',
]
TREES = [
    (path.name.partition("-")[0], json.loads(path.read_bytes())) for path in corpus("http") if "valid" in path.name
]
FAST = Behaviour(step_s=0.0)
Ask = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Sends bytes and returns all that comes back until the router hangs up. It runs while a call does."""
    with FakeCluster(behaviour=FAST) as cluster, asyncio.Runner() as runner:
        router = running_router(cluster)
        service, _ = runner.run(router.__aenter__())

        def run(data: bytes) -> bytes:
            with bounded():
                return runner.run(exchange(str(service.http_address), data))

        yield run
        runner.run(router.__aexit__(None, None, None))


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """What is not whole is waited for so briefly that hundreds of them can be tried."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_protocol, "HEAD_S", 0.1)
        patch.setattr(http_body, "READ_S", 0.1)
        patch.setattr(http_protocol, "BODY_S", 1.0)
        yield


async def exchange(address: str, data: bytes) -> bytes:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    answer = bytearray()
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        async with asyncio.timeout(30):
            while piece := await reader.read(1 << 16):
                answer += piece
    writer.close()
    return bytes(answer)


def post(ask: Ask, method: str, body: bytes) -> int:
    """The status; an answer that is JSON is that of OpenAI's clients."""
    head = f"POST {PATHS[method]} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    answer = ask(head.encode() + body)
    status = int(answer.split()[1])
    if status != 200:
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) < 2000
    return status


@pytest.mark.parametrize("path", corpus("http"), ids=lambda path: path.name)
def test_corpus(ask: Ask, path: Path) -> None:
    assert post(ask, path.name.partition("-")[0], path.read_bytes()) == (200 if "valid" in path.name else 400)


@fuzz
@given(st.sampled_from(sorted(PATHS)), mutated(seeds("http")))
def test_spoilt_bytes(ask: Ask, method: str, data: bytes) -> None:
    assert post(ask, method, data) in FAULTS


@fuzz
@given(st.sampled_from(TREES).flatmap(lambda seed: st.tuples(st.just(seed[0]), changed([seed[1]]))))
def test_spoilt_values(ask: Ask, spoilt: tuple[str, Any]) -> None:
    method, tree = spoilt
    assert post(ask, method, json.dumps(tree).encode()) in FAULTS


@fuzz
@given(mutated(HEADS).filter(lambda data: b"\r\nconnection: close\r\n\r\n" in data))
def test_spoilt_heads(ask: Ask, data: bytes) -> None:
    with impatient():
        answer = ask(data)
    assert not answer or 200 <= int(answer.rpartition(b"HTTP/1.1 ")[2].split()[0]) < 500
