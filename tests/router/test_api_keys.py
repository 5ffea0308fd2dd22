"""API keys at a router's two ports: who gets in, and what happens when a holder asks for too much."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai import AsyncOpenAI

from splitserve.client import AsyncClient, SplitserveClientError
from splitserve.cluster.api_key_file import add_api_key
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.service import RouterService
from tests.router.routers import MODEL, nothing_left, running_router

WRONG = "sk-" + "x" * 43
SLOW = Behaviour(step_s=0.05)


@dataclass
class Keys:
    """A file with keys of alice, who has limits, and bob, who has none."""

    file: Path
    limits: str = ""
    key: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.key["alice"] = add_api_key(self.file, "alice")
        with self.file.open("a") as file:
            file.write(self.limits)
        self.key["bob"] = add_api_key(self.file, "bob")


Scenario = Callable[[RouterService], Awaitable[None]]


def run(keys: Keys, scenario: Scenario, cluster: FakeCluster) -> None:
    async def main() -> None:
        connection, security = {"api_key": keys.key["bob"]}, {"api_keys": str(keys.file)}
        async with running_router(cluster, connection=connection, security=security) as (service, _):
            await scenario(service)

    asyncio.run(main())


def official(service: RouterService, key: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"http://{service.http_address}/v1", api_key=key, max_retries=0)


async def ask(service: RouterService, key: str | None, tokens: int = 2) -> str:
    """How a call by gRPC ends."""
    async with AsyncClient(service.address, api_key=key) as client:
        try:
            await client.generate([5, 6], max_tokens=tokens).result()
        except SplitserveClientError as error:
            return error.code if error.retry_after_s is None else f"{error.code} for {error.retry_after_s:.0f} s"
        return "OK"


def test_only_known_keys_get_in(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.toml")

    async def scenario(service: RouterService) -> None:
        for name in ("alice", "bob"):
            async with official(service, keys.key[name]) as client:
                answer = await client.completions.create(model=MODEL, prompt=[5, 6], max_tokens=2)
                assert answer.choices[0].finish_reason == "length"
                assert [model.id for model in (await client.models.list()).data] == [MODEL]
            assert await ask(service, keys.key[name]) == "OK"
        for key in (WRONG, keys.key["bob"].upper(), keys.key["bob"][:-1], keys.key["bob"] + "x"):
            async with official(service, key) as client:
                with pytest.raises(openai.AuthenticationError, match="does not know that API key") as caught:
                    await client.completions.create(model=MODEL, prompt=[5, 6], max_tokens=2)
                assert caught.value.code == "unauthenticated"
                assert caught.value.response.headers["www-authenticate"] == "Bearer"
                assert key not in str(caught.value)
            assert await ask(service, key) == "UNAUTHENTICATED"
        assert await ask(service, None) == "UNAUTHENTICATED"

    with FakeCluster() as cluster, nothing_left(cluster):
        run(keys, scenario, cluster)


def test_every_endpoint_but_health_asks_for_a_key(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.toml")

    async def scenario(service: RouterService) -> None:
        bob = keys.key["bob"].encode()
        async with httpx.AsyncClient(base_url=f"http://{service.http_address}") as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/v1/models")).status_code == 401
            for method, path in [
                ("POST", "/v1/completions"),
                ("POST", "/v1/chat/completions"),
                ("GET", "/v1/models"),
                ("GET", f"/v1/models/{MODEL}"),
                ("POST", "/tokenize"),
                ("POST", "/detokenize"),
            ]:
                for header in (b"", b"Bearer", b"Basic " + bob, bob, b"Bearer \xff"):
                    headers = [(b"authorization", header)]
                    answer = await client.request(method, path, headers=headers, content=b"no JSON")
                    assert (answer.status_code, path) == (401, path)
                    assert answer.json()["error"]["type"] == "invalid_request_error"
            lower = {"authorization": f"bearer {keys.key['bob']}"}
            assert (await client.get("/v1/models", headers=lower)).status_code == 200
        async with AsyncClient(service.address) as stranger:
            await stranger.healthy()
            for call in (stranger.models(), stranger.status(), stranger.tokenize("a"), stranger.detokenize([5])):
                with pytest.raises(SplitserveClientError, match="UNAUTHENTICATED: this cluster asks for an API key"):
                    await call

    with FakeCluster() as cluster:
        run(keys, scenario, cluster)


def test_a_holder_over_its_limits_is_told_when_to_come_back(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.toml", "requests_per_minute = 2\n")

    async def scenario(service: RouterService) -> None:
        async with official(service, keys.key["alice"]) as client:
            for _ in range(2):
                await client.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=2)
            with pytest.raises(openai.RateLimitError, match="alice has no requests left for this minute") as caught:
                await client.completions.create(model=MODEL, prompt="a", max_tokens=2)
            headers = caught.value.response.headers
            assert 25 <= int(headers["retry-after"]) <= 30
            assert 25_000 <= int(headers["retry-after-ms"]) <= 30_000
        assert await ask(service, keys.key["alice"]) == "RESOURCE_EXHAUSTED for 30 s"
        assert await ask(service, keys.key["bob"]) == "OK"
        async with AsyncClient(service.address, api_key=keys.key["alice"]) as alice:
            for call in (alice.tokenize("a"), alice.detokenize([5])):
                with pytest.raises(SplitserveClientError, match="alice has no requests left"):
                    await call
            assert (await alice.models())[0].name == MODEL, "what costs nothing"
        key = {"authorization": f"Bearer {keys.key['alice']}"}
        async with httpx.AsyncClient(base_url=f"http://{service.http_address}", headers=key) as client:
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
                refused = await client.post(path, content=b"no JSON")
                assert (refused.status_code, path) == (429, path), "before it is read"

    with FakeCluster() as cluster, nothing_left(cluster):
        run(keys, scenario, cluster)


def test_answers_count_for_the_minute_and_running_ones_at_once(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.toml", "tokens_per_minute = 20\nconcurrent = 1\n")

    async def scenario(service: RouterService) -> None:
        async with official(service, keys.key["alice"]) as client:
            stream = await client.completions.create(model=MODEL, prompt=[5, 6], max_tokens=24, stream=True)
            chunks = aiter(stream)
            await anext(chunks)
            assert await ask(service, keys.key["alice"]) == "RESOURCE_EXHAUSTED for 1 s", "it runs"
            async for _ in chunks:
                pass
            with pytest.raises(openai.RateLimitError, match="alice has no tokens left for this minute") as caught:
                await client.completions.create(model=MODEL, prompt="a", max_tokens=2)
            assert 15 <= int(caught.value.response.headers["retry-after"]) <= 21

    with FakeCluster(behaviour=SLOW) as cluster, nothing_left(cluster):
        run(keys, scenario, cluster)


def test_a_client_that_leaves_gives_its_place_back(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.toml", "concurrent = 1\n")

    async def scenario(service: RouterService) -> None:
        async with AsyncClient(service.address, api_key=keys.key["alice"]) as client:
            stream = client.generate([5, 6], max_tokens=200)
            await anext(aiter(stream))
            stream.cancel()
        for _ in range(100):
            if (outcome := await ask(service, keys.key["alice"])) == "OK":
                break
            await asyncio.sleep(0.02)
        assert outcome == "OK"

    with FakeCluster(behaviour=SLOW) as cluster, nothing_left(cluster):
        run(keys, scenario, cluster)


def test_the_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = Keys(tmp_path / "keys.toml", "requests_per_minute = 1\n")
    alice, bob = keys.key["alice"], keys.key["bob"]

    async def scenario(service: RouterService) -> None:
        carol = add_api_key(keys.file, "carol")
        assert await ask(service, carol) == "OK"
        assert await ask(service, alice) == "OK"
        dave = add_api_key(keys.file, "dave")
        assert await ask(service, dave) == "OK"
        assert (await ask(service, alice)).startswith("RESOURCE_EXHAUSTED"), "what she used stays counted"
        good = keys.file.read_text()
        keys.file.write_text("[half of")
        assert await ask(service, dave) == "OK"
        assert "the former version stays in use; security.api_keys" in caplog.text
        keys.file.write_text(good.partition("[bob]")[0].replace("minute = 1", "minute = 2"))
        assert await ask(service, bob) == "UNAUTHENTICATED"
        assert await ask(service, alice) == "OK"

    with FakeCluster() as cluster:
        run(keys, scenario, cluster)
    assert not any(key in caplog.text for key in keys.key.values())


def test_log_lines_name_the_holder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = Keys(tmp_path / "keys.toml")

    async def scenario(service: RouterService) -> None:
        assert await ask(service, keys.key["alice"]) == "OK"

    with FakeCluster() as cluster:
        run(keys, scenario, cluster)
    over: Any = [record for record in caplog.records if record.getMessage() == "request over"]
    assert [record.tenant for record in over] == ["alice"]


@pytest.mark.parametrize("key", ["é", "a\nb", "a\0"])
def test_a_key_that_cannot_be_sent_is_the_users_own_fault_and_not_repeated(key: str) -> None:
    with pytest.raises(SplitserveClientError, match="api_key: give printable ASCII") as caught:
        AsyncClient("127.0.0.1:1", api_key=key)
    assert key not in str(caught.value)
