"""Clients that send too much, too slowly or from too many connections, before the router knows who they are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from splitserve.router import http_protocol
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.http_body import MAX_BODY_BYTES
from splitserve.router.http_protocol import MAX_HEAD_BYTES, MAX_HEADERS, MAX_MESSAGE_BYTES
from splitserve.router.service import RouterService
from tests.router.routers import running_router, tokenizer

HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n"
CHUNKED = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"

Scenario = Callable[[RouterService], Awaitable[None]]


def run(scenario: Scenario, behaviour: Behaviour | None = None, **router: Any) -> None:
    async def main() -> None:
        async with running_router(cluster, **router) as (service, _):
            await scenario(service)
            assert (await ask(service, HEALTH + b"connection: close\r\n\r\n"))[0] == 200, "it goes on"

    with FakeCluster(behaviour=behaviour or Behaviour()) as cluster:
        asyncio.run(main())


async def connect(service: RouterService) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = str(service.http_address).rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def ask(service: RouterService, *pieces: bytes) -> tuple[int, str]:
    """Send pieces as long as they are taken: the last status and message that came, once the connection is closed."""
    reader, writer = await connect(service)
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
    return await last_answer(reader, writer)


async def last_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, str]:
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(10):
            while piece := await reader.read(1 << 16):
                data += piece
    writer.close()
    head, _, body = bytes(data).rpartition(b"\r\n\r\n")
    if not head:
        return 0, ""
    status = int(head.rpartition(b"HTTP/1.1 ")[2].split()[0])
    content = json.loads(body)
    return status, content.get("error", {}).get("message", "")


def test_a_head_is_bounded_however_it_comes() -> None:
    async def scenario(service: RouterService) -> None:
        close = b"connection: close\r\n"
        fits = b"".join(b"h%d: x\r\n" % number for number in range(MAX_HEADERS - 2))
        assert (await ask(service, HEALTH + close + fits + b"\r\n"))[0] == 200
        expected = (431, f"a head has at most {MAX_HEADERS} headers and {MAX_HEAD_BYTES} bytes")
        assert await ask(service, HEALTH + close + fits + b"one: more\r\n\r\n") == expected
        assert await ask(service, HEALTH + b"h: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n") == expected
        assert await ask(service, b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n\r\n") == expected
        for begun in (HEALTH + b"h: ", HEALTH, b"GET /"):
            assert (await ask(service, begun, *[b"x" * 1000] * 2000))[0] in (431, 400, 0), "or cut off while it sends"

    run(scenario)


def test_a_head_that_never_ends_takes_no_memory() -> None:
    async def scenario(service: RouterService) -> None:
        for begun in (HEALTH + b"h: ", b"GET /", HEALTH):
            reader, writer = await connect(service)
            writer.write(begun)
            sent = 0
            with contextlib.suppress(ConnectionError):
                while sent < 20 << 20 and not reader.at_eof():
                    writer.write(b"x" * 65536)
                    await writer.drain()
                    await asyncio.sleep(0)
                    sent += 65536
            writer.close()
            assert sent < 20 << 20, begun

    run(scenario)


def test_a_slow_head_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.6)

    async def scenario(service: RouterService) -> None:
        async def drip(*pieces: bytes) -> tuple[int, str]:
            reader, writer = await connect(service)
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    writer.write(piece)
                    await asyncio.sleep(0.1)
            return await last_answer(reader, writer)

        began = time.monotonic()
        late = (408, "the request was not whole within 0.6 s")
        whole = HEALTH + b"\r\n"
        slow = (
            drip(),
            drip(*[HEALTH[at : at + 1] for at in range(3)]),
            drip(whole, *[HEALTH[at : at + 1] for at in range(3)]),
            drip(whole, *[b"\r\n"] * 3),
        )
        assert set(await asyncio.gather(*slow)) == {late}
        assert time.monotonic() - began < 4.5, "before the time that uvicorn keeps connections alive"

    run(scenario)


def test_a_stream_outlives_the_time_of_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.2)
    monkeypatch.setattr(http_protocol, "BODY_S", 0.2)

    async def scenario(service: RouterService) -> None:
        body = json.dumps({"prompt": [5, 6], "max_tokens": 30, "stream": True}).encode()
        reader, writer = await connect(service)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nconnection: close\r\nhost: x\r\n")
        writer.write(b"content-length: %d\r\n\r\n" % len(body) + body)
        async with asyncio.timeout(10):
            assert b"data: [DONE]" in await reader.read(-1)
        writer.close()

    run(scenario, Behaviour(step_s=0.03))


def test_who_goes_on_sending_after_the_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "BODY_S", 1.0)

    async def scenario(service: RouterService) -> None:
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        for flood in (chunk, b"t: " + b"x" * 65536 + b"\r\n", b"x" * 65536):
            reader, writer = await connect(service)
            writer.write(CHUNKED + (b"" if flood is chunk else b"2\r\n{}\r\n0\r\n"))
            sent = 0
            with contextlib.suppress(ConnectionError):
                while sent < 2 * MAX_MESSAGE_BYTES:
                    writer.write(flood)
                    await writer.drain()
                    sent += len(flood)
            assert sent < 2 * MAX_MESSAGE_BYTES
            writer.close()
        reader, writer = await connect(service)
        writer.write(b"POST /none HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n")
        assert (await last_answer(reader, writer))[0] in (404, 408), "404, then cut off"

    run(scenario)


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_who_sends_all_before_reading_is_told_why_it_was_too_much(version: bytes) -> None:
    """To close a connection with bytes unread resets it, and the answer is lost."""

    async def scenario(service: RouterService) -> None:
        for size in (MAX_BODY_BYTES + 1, MAX_MESSAGE_BYTES - 1000):
            reader, writer = await connect(service)
            head = b"POST /v1/completions HTTP/%s\r\nhost: x\r\nconnection: close\r\n" % version
            writer.write(head + b"content-length: %d\r\n\r\n" % size)
            for start in range(0, size, 1 << 20):
                writer.write(b"x" * min(1 << 20, size - start))
                await writer.drain()
                await asyncio.sleep(0.001)
            expected = (413, f"the body is larger than {MAX_BODY_BYTES} bytes")
            assert await last_answer(reader, writer) == expected, "and closed: it is read to its end"

    run(scenario)


OFFER = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "offer", [OFFER, OFFER.replace(b"connection: ", b"connection: close, "), b"", b"upgrade: x\r\n"]
)
def test_an_offer_of_another_protocol_is_declined(offer: bytes, chunked: bool) -> None:
    """As Java's HttpClient makes it with each first request."""

    async def scenario(service: RouterService) -> None:
        body = json.dumps({"prompt": "the fox"}).encode()
        length = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % len(body)
        head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\n" + offer + length + b"\r\n\r\n"
        sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
        for pieces in ([head + sent], [head, sent], [head[:70], head[70:], sent[:9], sent[9:]]):
            reader, writer = await connect(service)
            for _ in range(1 if b"close" in offer else 2):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.02)
                status = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
                assert status.startswith(b"HTTP/1.1 200 ")
                answer = json.loads(await reader.readuntil(b"}"))
                assert answer["tokens"] == tokenizer().encode("the fox")
            writer.write((head + sent) * 2 + HEALTH + b"connection: close\r\n\r\n")
            rest = await asyncio.wait_for(reader.read(), 5)
            assert rest.count(b"HTTP/1.1 200 ") == (0 if b"close" in offer else 3), "and so are those behind it"
            writer.close()

    run(scenario)


def test_what_offers_another_protocol_is_bounded_as_well() -> None:
    async def scenario(service: RouterService) -> None:
        _, writer = await connect(service)
        writer.write(b"POST /tokenize HTTP/1.1\r\nhost: x\r\n" + OFFER + b"transfer-encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 2 * MAX_MESSAGE_BYTES:
                writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
                await writer.drain()
                sent += 65536
        assert sent < 2 * MAX_MESSAGE_BYTES
        writer.close()
        assert (await ask(service, b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n" + OFFER + b"\r\n"))[0] == 400

    run(scenario)


def test_connections_are_bounded() -> None:
    async def scenario(service: RouterService) -> None:
        held = [await connect(service) for _ in range(4)]
        await asyncio.sleep(0.05)
        for _ in range(3):
            assert await ask(service) == (503, "4 connections are open, the most of this router")
        held.pop()[1].close()
        await asyncio.sleep(0.1)
        held.append(await connect(service))
        held[-1][1].write(HEALTH + b"connection: close\r\n\r\n")
        assert (await last_answer(*held.pop()))[0] == 200
        for _, writer in held:
            writer.close()
        await asyncio.sleep(0.1)

    run(scenario, max_active=1, max_queue=1)


def test_connections_of_grpc_are_bounded() -> None:
    async def scenario(service: RouterService) -> None:
        host, _, port = service.address.rpartition(":")

        async def greeting() -> bytes:
            """What a server of HTTP/2 says first; nothing where it hangs up."""
            reader, writer = await asyncio.open_connection(host, int(port))
            held.append(writer)
            return await asyncio.wait_for(reader.read(100), 5)

        held: list[asyncio.StreamWriter] = []
        greetings = [await greeting() for _ in range(6)]
        assert [bool(one) for one in greetings].count(True) == 4 - 1, "the client that waited for the router holds one"
        held[0].close()
        for _ in range(100):
            if await greeting():
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError("no place was free again")
        for writer in held:
            writer.close()

    run(scenario, max_active=1, max_queue=1)


def test_grpc_metadata_and_messages_are_bounded() -> None:
    async def scenario(service: RouterService) -> None:
        async with grpc.aio.insecure_channel(service.address) as channel:
            call: Any = channel.unary_unary("/splitserve.v1.SplitServe/Tokenize")
            for data, metadata in [(b"", (("h", "x" * 40_000),)), (b"x" * (17 << 20), ())]:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(data, metadata=metadata, timeout=10)
                assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED

    run(scenario)
