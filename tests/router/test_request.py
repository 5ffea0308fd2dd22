"""What becomes of a request when engines are lost."""

from __future__ import annotations

import asyncio

import pytest

from splitserve.cluster.errors import WorkerUnavailable
from splitserve.cluster.messages import Busy
from splitserve.cluster.sampling import SamplingParams
from splitserve.router.detokenizer import Detokenizer, TokenTable
from splitserve.router.request import Placement, Request
from tests.router.tiny_tokenizers import byte_level


def new_request() -> Request:
    table = TokenTable(byte_level())
    return Request("r", [5, 6], SamplingParams(), 10.0, lambda: Detokenizer(table), lambda sample: None)


def test_a_decode_engine_that_is_lost_while_it_is_asked_counts_as_busy() -> None:
    async def scenario() -> None:
        request = new_request()
        reply = request.begin_attempt(Placement("prefill/0/0", "decode/0/0"))
        request.lose("decode/0/0", "restarted")
        assert isinstance(await reply, Busy)
        assert request.placement == Placement()

    asyncio.run(scenario())


@pytest.mark.parametrize("engine", ["prefill/0/0", "decode/0/0"])
def test_an_engine_that_is_lost_while_it_works_ends_the_request(engine: str) -> None:
    async def scenario() -> None:
        request = new_request()
        reply = request.begin_attempt(Placement("prefill/0/0", "decode/0/0"))
        reply.set_result(Busy("r", 1, 0.0))  # any answer: the question is over
        request.lose(engine, "restarted")
        with pytest.raises(WorkerUnavailable, match=f"worker {engine} restarted"):
            await request.chunk()

    asyncio.run(scenario())
