"""What a request takes of a router's memory is free when it is over, without a collection of garbage.

Collections hold up all streams, and until they come a prompt of 32,000 tokens keeps a megabyte. Requests that fail or
that their client leaves are left to them: an error knows the frames that it was raised in, and those know it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError

from splitserve.client import AsyncClient
from splitserve.router.attempt import Attempt
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.openai_requests import Call
from splitserve.router.openai_responses import Answer
from splitserve.router.request import Request
from splitserve.router.service import RouterService
from tests.router.routers import MODEL, eventually, running_router

PROMPT = list(range(5, 45))
MESSAGES: Any = [{"role": "user", "content": "Hello"}]

Ask = Callable[[RouterService, AsyncClient], Awaitable[None]]


def by_http(*, chat: bool = False, **body: Any) -> Ask:
    async def ask(service: RouterService, _: AsyncClient) -> None:
        url = f"http://{service.http_address}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            asked: dict[str, Any] = {"model": MODEL, "max_tokens": 12, **body}
            with contextlib.suppress(BadRequestError):
                if chat:
                    answer = await client.chat.completions.create(messages=MESSAGES, **asked)
                else:
                    answer = await client.completions.create(prompt=PROMPT, **asked)
                if body.get("stream"):
                    async for _event in answer:
                        pass

    return ask


def by_grpc(**sampling: Any) -> Ask:
    async def ask(_: RouterService, client: AsyncClient) -> None:
        await client.generate(PROMPT, max_tokens=12, **sampling).result()

    return ask


ASKED: dict[str, Ask] = {
    "stream": by_http(stream=True),
    "stream with log probabilities": by_http(stream=True, n=2, logprobs=2, echo=True),
    "whole": by_http(logprobs=2),
    "chat": by_http(chat=True, stream=True),
    "stopped by a string": by_http(stop=["e"]),
    "refused": by_http(temperature=-1),
    "over gRPC": by_grpc(),
    "over gRPC, stopped by a string": by_grpc(stop=["e"]),
}


@pytest.mark.parametrize("case", ASKED)
def test_nothing_of_a_request_waits_for_a_collection(case: str) -> None:
    ask = ASKED[case]

    async def main() -> None:
        async with running_router(cluster) as (service, client):
            await ask(service, client)  # what the first one of its kind makes may stay
            await eventually(lambda: not service.dispatcher.admission.active)
            gc.collect()
            gc.disable()
            try:
                for _ in range(3):
                    await ask(service, client)
                await eventually(lambda: not living())
            finally:
                gc.enable()

    with FakeCluster() as cluster:
        asyncio.run(main())


def living() -> list[object]:
    return [one for one in gc.get_objects() if issubclass(type(one), Request | Attempt | Call | Answer)]
