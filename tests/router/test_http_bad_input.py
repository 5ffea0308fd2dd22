"""What is no request, by raw sockets: every fault is told, in OpenAI's form, and the router goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import time
from typing import Any

import pytest

from splitserve.cluster.errors import InvalidRequest
from splitserve.router import http_body, http_server
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.http_body import parse_object
from splitserve.router.openai_bodies import CompletionBody, parse
from splitserve.router.service import RouterService
from tests.router.routers import CONTEXT, MODEL, eventually, nothing_left, running_router, tokenizer

GOOD: dict[str, Any] = {"model": MODEL, "prompt": "the fox", "max_tokens": 2}
HIGHEST = tokenizer().vocab_size - 1
TEXT_PART = {"type": "text", "text": "x"}

COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt: found None; this field is needed"),
    ({"prompt": ""}, "prompt: found ''; give at least one character"),
    ({"prompt": []}, "prompt: found []; give a text, token ids, or a list of either"),
    ({"prompt": 5}, "prompt: found 5; give a text"),
    ({"prompt": [True]}, "prompt[0]: found True; give a text or a list of token ids"),
    ({"prompt": [1, "a"]}, "prompt: found [1, 'a']; give a text or a list of token ids"),
    ({"prompt": ["a", [1.5]]}, "prompt[1]: found [1.5]"),
    ({"prompt": ["a", ""]}, "prompt[1]: found ''"),
    ({"prompt": [[]]}, "prompt: found 'no tokens'"),
    ({"prompt": ["a"] * 257}, "prompt: found '257 prompts'; give at most 256"),
    ({"prompt": [1, HIGHEST + 1]}, f"prompt: found {HIGHEST + 1}; give token ids from 0 to {HIGHEST}"),
    ({"prompt": [10**400]}, "prompt: found 1000"),
    ({"prompt": [1] * CONTEXT}, f"prompt: found '{CONTEXT} tokens'"),
    ({"prompt": "\ud800x"}, "prompt: found '\\ud800'; give whole characters"),
    ({"max_tokens": 0}, "max_tokens: found 0"),
    ({"max_tokens": 10**400}, "max_tokens: found 1000"),
    ({"max_tokens": "5"}, "max_tokens: found '5'; it should be a valid integer"),
    ({"max_tokens": 1.5}, "max_tokens: found 1.5"),
    ({"temperature": True}, "temperature: found True; it should be a valid number"),
    ({"temperature": 10**400}, "temperature: found 1000"),
    ({"temperature": 101}, "temperature: found 101.0; give a value from 0 to 100"),
    ({"seed": 2**63}, "seed: found 9223372036854775808"),
    ({"n": 0}, "n: found 0; give a value from 1 to 64"),
    ({"best_of": 3}, "best_of: found 3; leave it out, or give n, 1"),
    ({"suffix": "x"}, "suffix: found 'x'; this cluster does not support it yet"),
    ({"logprobs": True}, "logprobs: found True"),
    ({"logprobs": 21}, "logprobs: found 21"),
    ({"stop": ["x", 5]}, "stop: found 5; give a text"),
    ({"stop": {"x": 1}}, "stop: found {'x': 1}; give a text"),
    ({"stop": ["\udfff"]}, "stop: found '\\udfff'; give whole characters"),
    ({"logit_bias": {"fox": 1}}, "logit_bias: found 'fox'; give token ids as keys"),
    ({"logit_bias": {"1": 101}}, "logit_bias: found 101"),
    ({"logit_bias": {"1": True}}, "logit_bias.1: found True; give a number"),
    ({"logit_bias": {"1": 10**400}}, "logit_bias.1: found 1000"),
    ({"stream_options": {"include_usage": True}}, "stream_options: found 'no stream'"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage: found True; no such field here"),
    ({"temprature": 1}, "temprature: found 1; no such field here; leave it out"),
    ({"x" * 5000: 1}, f"{'x' * 197}...: found 1; no such field here"),
    ({"stream": True, "stream_options": {"y" * 5000: 1}}, f"stream_options.{'y' * 182}...: found 1; no such field"),
    ({"model": 5}, "model: found 5"),
    ({"cache_salt": 5}, "cache_salt: found 5; it should be a valid string"),
    ({"cache_salt": "x" * 257}, "cache_salt: found '257 characters'; give at most 256"),
    ({"cache_salt": "\ud800"}, "cache_salt: found '\\ud800'; give whole characters"),
]
CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages: found []; give at least one message"),
    ({"messages": "hi"}, "messages: found 'hi'"),
    ({"messages": ["hi"]}, "messages[0]: found 'hi'; give an object with role and content"),
    ({"messages": [{"content": "x"}]}, "messages[0].role: found None; give a text"),
    ({"messages": [{"role": "user"}]}, "messages[0].content: found None; give a text"),
    ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role: found ''"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 5}]}, "messages[0].tool_call_id: found 5"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]: found {}; give a function"),
    ({"messages": [{"role": "user", "content": [TEXT_PART, {"type": "image_url"}]}]}, "messages[0].content[1]: found"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls: found [{}]"),
    ({"tools": [{"type": "function"}]}, "tools[0]: found {'type': 'function'}; give"),
    ({"tool_choice": "required"}, "tool_choice: found 'required'; give tools to choose from"),
    ({"response_format": {"type": "xml"}}, "response_format: found {'type': 'xml'}"),
    ({"structured_outputs": {"regex": "(("}}, "structured_outputs.regex: found '(('"),
    ({"guided_regex": "a"}, "guided_regex: found 'a'; no such field here; leave it out"),
    ({"top_logprobs": 2}, "top_logprobs: found 2; give it with logprobs: true only"),
    ({"max_completion_tokens": CONTEXT}, f"max_tokens: found {CONTEXT}"),
    ({"reasoning_effort": "low"}, "reasoning_effort: found 'low'; no such field here"),
]
BODIES: list[tuple[bytes, str]] = [
    (b"", "give one JSON object in UTF-8"),
    (b"{", "give one JSON object in UTF-8"),
    (b"[1]", "body: found [1]; give a JSON object"),
    (b'{"prompt": "\xff\xfe"}', "can't decode byte 0xff"),
    (json.dumps(GOOD).encode("utf-16"), "give one JSON object in UTF-8"),
    (b'{"prompt": ' + b"[" * 1_000_000, "values are nested too deep"),
    (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "values are nested too deep"),
    (b'{"prompt": "x", "temperature": NaN}', "NaN is no JSON number"),
    (b'{"prompt": "x", "temperature": -Infinity}', "-Infinity is no JSON number"),
    (b'{"prompt": "x", "temperature": 1e999}', "temperature: found inf"),
    (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "limit"),
    (b'{"prompt": "x", "prompt": "y"}', "'prompt' stands there twice"),
    (b'{"prompt": "x", "logit_bias": {"1": 1, "1": 2}}', "'1' stands there twice"),
]


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A whole request; the connection is closed after it."""
    lines = [f"POST {path} HTTP/1.1", "host: x", "connection: close", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def ask(service: RouterService, data: bytes) -> tuple[int, dict[str, Any]]:
    """Send bytes as they are: the status and the JSON that come back."""
    reader, writer = await connect(service)
    writer.write(data)
    status, body = await answer(reader)
    writer.close()
    return status, body


async def connect(service: RouterService) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = str(service.http_address).rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    """The status and JSON of the next response."""
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = (line for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
        body = await reader.readexactly(int(length.partition(b":")[2]))
    return int(head.split()[1]), json.loads(body)


async def good(service: RouterService) -> None:
    """The router answers still."""
    status, body = await ask(service, post("/v1/completions", json.dumps(GOOD).encode()))
    assert (status, body["usage"]["completion_tokens"]) == (200, 2)


def test_every_fault_is_named() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, _):
            chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
            for path, base, cases in (("/v1/completions", GOOD, COMPLETIONS), ("/v1/chat/completions", chat, CHATS)):
                for change, message in cases:
                    status, body = await ask(service, post(path, json.dumps(base | change).encode()))
                    assert status == 400, (change, body)
                    assert message in body["error"]["message"]
                    assert body["error"]["type"] == "invalid_request_error"
                    assert body["error"]["param"] == body["error"]["message"].partition(": found")[0]
                    assert body["error"]["code"] == "invalid_argument"
                await good(service)

    with FakeCluster() as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_bodies_that_are_no_json_object_are_400() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, _):
            for data, message in BODIES:
                for path in ("/v1/completions", "/tokenize"):
                    status, body = await ask(service, post(path, data))
                    assert status == 400, data[:40]
                    if path == "/v1/completions":
                        assert message in body["error"]["message"]
                    assert len(body["error"]["message"]) < 500
            await good(service)

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"{%s}" % b",".join(b'"%d":0' % (number % 199_999) for number in range(200_000)), "'0' stands there twice"),
        (b'{"prompt":"x","stop_token_ids":[%s]}' % b",".join([b'""'] * 500_000), "stop_token_ids.0: found ''"),
        (b'{"prompt":"x",%s}' % b",".join(b'"x%d":0' % number for number in range(200_000)), "x0: found 0; no such"),
        (
            b'{"prompt":"x","logit_bias":{%s}}' % b",".join(b'"%d":""' % n for n in range(200_000)),
            "logit_bias.0",
        ),
    ],
    ids=["twice", "ids", "fields", "biases"],
)
def test_many_faults_take_no_longer_than_one(body: bytes, fault: str) -> None:
    began = time.process_time()
    with pytest.raises(InvalidRequest, match=re.escape(fault)):
        parse(CompletionBody, parse_object(body)).sampling_params(None)
    assert time.process_time() - began < 1


def test_fields_that_change_nothing_are_let_through() -> None:
    harmless = {"user": "me", "metadata": {}, "store": True, "suffix": "", "best_of": 1, "top_k": -1, "seed": None}

    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, _):
            for path, base in (("/v1/completions", GOOD), ("/v1/chat/completions", {"max_tokens": 2})):
                messages = [
                    {"role": "developer", "content": "Be brief", "name": "boss"},
                    {"role": "assistant", "content": "Yes", "refusal": None, "annotations": [], "tool_calls": None},
                ]
                said = {} if "prompt" in base else {"messages": messages, "tools": [], "tool_choice": "none"}
                more = harmless if "prompt" in base else {"user": "me", "response_format": {"type": "text"}}
                status, body = await ask(service, post(path, json.dumps(base | said | more).encode()))
                assert status == 200, body

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (post("/v1/nothing", b"{}"), 404, "not_found"),
        (b"GET /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 405, "method_not_allowed"),
        (b"GET /v1/models/a/b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 404, "not_found"),
        (post("/v1/completions", json.dumps(GOOD | {"model": "gpt-5"}).encode()), 404, "not_found"),
    ],
)
def test_paths_methods_and_models_that_are_not_there(data: bytes, status: int, code: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, _):
            answered, body = await ask(service, data)
            assert (answered, body["error"]["code"]) == (status, code)

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))


def test_a_body_over_the_limit_is_413_before_it_is_read_or_parsed() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, _):
            announced = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 17000000\r\n\r\n"
            status, body = await ask(service, announced)
            assert (status, body["error"]["code"]) == (413, "payload_too_large")
            reader, writer = await connect(service)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                for _ in range(17):
                    writer.write(b"100000\r\n" + b" " * 0x100000 + b"\r\n")
                    await writer.drain()
            status, _ = await answer(reader)
            assert status == 413
            writer.close()
            await good(service)

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))


def test_a_slow_body_is_waited_for_and_a_stalled_one_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        data = post("/v1/completions", json.dumps(GOOD).encode())
        async with running_router(cluster) as (service, _):
            reader, writer = await connect(service)
            for byte in data:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.001)
            assert (await answer(reader))[0] == 200
            writer.close()
            monkeypatch.setattr(http_body, "READ_S", 0.2)
            status, body = await ask(service, data[:-5])
            assert (status, body["error"]["code"]) == (408, "request_timeout")
            reader, writer = await connect(service)
            writer.write(data[:-5])
            writer.close()  # in the middle of a body
            await good(service)

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))


def test_bytes_that_are_no_http_end_their_connection_only() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, _):
            for data in (b"\x00" * 100, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
                reader, writer = await connect(service)
                writer.write(data)
                async with asyncio.timeout(5):
                    head = await reader.read(12)
                assert head in (b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 505"), (data, head)
                writer.close()
            await good(service)

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))


def test_a_connection_that_breaks_in_mid_stream_frees_the_engines() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, _):
            body = json.dumps({"prompt": [5, 6], "max_tokens": 200, "stream": True}).encode()
            reader, writer = await connect(service)
            writer.write(post("/v1/completions", body))
            async with asyncio.timeout(5):
                await reader.readuntil(b"data: ")
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # close by reset
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()
            await eventually(lambda: not any(engine.jobs for engine in cluster.engines.values()), within_s=1.0)
            await good(service)

    with FakeCluster(behaviour=Behaviour(step_s=0.02)) as cluster:
        asyncio.run(scenario(cluster))


def test_a_client_that_does_not_read_holds_up_nobody_and_gets_all_of_it() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, _):
            asked = {"prompt": [5, 6], "max_tokens": 200, "n": 64, "logprobs": 0, "stream": True}
            reader, writer = await connect(service)
            writer.write(post("/v1/completions", json.dumps(asked).encode()))
            await eventually(lambda: cluster.engines["decode/0/0"].decoding)
            await good(service)
            await eventually(lambda: not cluster.engines["decode/0/0"].decoding, within_s=20)
            async with asyncio.timeout(20):
                data = await reader.read(-1)
            assert data.count(b'"finish_reason":"length"') == 64
            assert data.rstrip().endswith(b"data: [DONE]\n\n\r\n0")
            writer.close()

    with FakeCluster() as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_a_client_that_never_reads_keeps_no_drain_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "UNREAD_S", 1.0)

    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, _):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                host, _, port = str(service.http_address).rpartition(":")
                client.connect((host, int(port)))
                asked = {"prompt": [5, 6], "max_tokens": 200, "n": 64, "logprobs": 0, "stream": True}
                client.sendall(post("/v1/completions", json.dumps(asked).encode()))
                await eventually(lambda: cluster.engines["decode/0/0"].decoding)
                await asyncio.wait_for(service.drain(), 20)

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))


def test_responses_do_not_wait_for_acknowledgements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nagle's algorithm is off on accepted connections."""
    accepted: list[socket.socket] = []
    accept = socket.socket.accept

    def remember(listener: socket.socket) -> tuple[socket.socket, Any]:
        connection, address = accept(listener)
        accepted.append(connection)
        return connection, address

    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, _):
            _, writer = await connect(service)
            await eventually(lambda: accepted)
            await asyncio.sleep(0.05)
            assert accepted[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            writer.close()

    monkeypatch.setattr(socket.socket, "accept", remember)
    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))
