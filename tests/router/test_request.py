"""What becomes of a request's attempts when engines are lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import wraps

import pytest

from splitserve.cluster.messages import Busy, Failed, FirstToken, Granted, Joined, SampleToken, Ticket
from splitserve.cluster.sampling import SamplingParams
from splitserve.router.admission import Admission
from splitserve.router.attempt import Attempt, by_attempt
from splitserve.router.deadline import Deadline
from splitserve.router.detokenizer import Detokenizer, TokenTable
from splitserve.router.fake_engine import LAYOUT
from splitserve.router.metrics import RouterMetrics
from splitserve.router.policy import Placement
from splitserve.router.request import Request
from splitserve.router.timeline import Timeline
from tests.router.tiny_tokenizers import byte_level

PREFILL, DECODE = PLACEMENT = Placement("prefill/0/0", "decode/0/0")
TICKET = Ticket("r/1", 1, LAYOUT, 0, 2, 1.0, ())


def in_a_loop(test: Callable[[], None]) -> Callable[[], None]:
    @wraps(test)
    def run() -> None:
        async def scenario() -> None:
            test()

        asyncio.run(scenario())

    return run


def granted(n: int = 1) -> tuple[Request, Attempt]:
    table = TokenTable(byte_level())
    params = SamplingParams(n=n, max_tokens=9, prompt_logprobs=0)
    timeline = Timeline(RouterMetrics(Admission(1, 1), [], lambda: True))
    request = Request(
        "r", [5, 6], params, Deadline(10.0), timeline, lambda: Detokenizer(table), lambda request_id, sample: None
    )
    attempt = request.attempt(request.samples, PLACEMENT, 1)
    request.accept(Granted("r", 1, TICKET))
    return request, attempt


def token(sample: int, position: int, attempt: int = 1) -> SampleToken:
    return SampleToken("r", attempt, sample, position, 65 + position)


def first(n: int) -> FirstToken:
    return FirstToken("r", 1, tuple(token(sample, 2) for sample in range(n)), (), 1, 0.0, 0.0)


@in_a_loop
def test_a_decode_engine_that_is_lost_while_it_is_asked_counts_as_busy() -> None:
    request, _ = granted()
    attempt = request.attempt(request.samples, PLACEMENT, 1)
    request.accept(Joined("r", 1))
    assert [lost.number for lost in request.lose(DECODE)] == [1]
    assert isinstance(attempt.reply.result(), Busy)
    assert request.placement == Placement()


@in_a_loop
def test_so_does_one_whose_prefill_engine_is_lost_before_decode_has_answered() -> None:
    request, _ = granted()
    attempt = request.attempt(request.samples, PLACEMENT, 1)
    request.accept(Joined("r", 1))
    assert request.lose(PREFILL) == []
    assert isinstance(attempt.reply.result(), Busy)
    assert not request.has(attempt.number), "what decode still grants is refused"


@in_a_loop
def test_without_a_token_all_samples_begin_again_together() -> None:
    request, attempt = granted(n=3)
    request.accept_token(token(1, 3), 0.0)  # it came before its turn: prefill's first tokens are not there yet
    assert request.lose(DECODE) == [attempt]
    (samples,) = by_attempt(attempt.samples)
    again = request.attempt(samples, PLACEMENT, 1).reserve(LAYOUT, 1.0)
    assert (again.attempt, again.token_ids, again.params.n, again.output_tokens) == (2, [5, 6], 3, 0)
    assert again.params.prompt_logprobs == 0
    assert not request.has(1)
    request.accept(Granted("r", 2, TICKET))
    request.accept(FirstToken("r", 2, tuple(token(sample, 2, 2) for sample in range(3)), (), 0, 0.0, 0.0))
    assert [sample.token_ids for sample in request.samples] == [[67]] * 3


@in_a_loop
def test_with_tokens_each_sample_that_has_not_ended_goes_on_by_itself() -> None:
    request, attempt = granted(n=3)
    request.accept(first(3))
    request.accept_token(token(0, 3), 0.0)
    request.accept_token(SampleToken("r", 1, 1, 3, 9, "stop"), 0.0)
    assert request.lose(DECODE) == [attempt]
    reserves = [request.attempt(samples, PLACEMENT, 1).reserve(LAYOUT, 1.0) for samples in by_attempt(attempt.samples)]
    found = [(item.attempt, item.first_sample, item.token_ids, item.output_tokens, item.params.n) for item in reserves]
    assert found == [(2, 0, [5, 6, 67, 68], 2, 1), (3, 2, [5, 6, 67], 1, 1)]
    assert {item.params.prompt_logprobs for item in reserves} == {None}, "they are there already"


@in_a_loop
def test_a_prefill_engine_is_needed_until_decode_has_joined() -> None:
    request, attempt = granted()
    request.accept(first(1))
    request.accept(Joined("r", 1))
    assert request.lose(PREFILL) == []
    assert request.lose(DECODE) == [attempt]
    request, attempt = granted()
    request.accept(first(1))
    assert request.lose(PREFILL) == [attempt]


@in_a_loop
def test_what_has_ended_needs_no_engine() -> None:
    request, _ = granted()
    request.accept(FirstToken("r", 1, (SampleToken("r", 1, 0, 2, 9, "stop"),), (), 0, 0.0, 0.0))
    assert request.lose(DECODE) == request.lose(PREFILL) == []
    assert request.accept(Failed("r", 1, "UNAVAILABLE", "no KV came")) is None


@pytest.mark.parametrize(
    ("code", "goes_on"), [("UNAVAILABLE", True), ("RESOURCE_EXHAUSTED", True), ("INTERNAL", False)]
)
def test_a_failure_that_another_attempt_may_mend_loses_the_attempt_alone(code: str, goes_on: bool) -> None:
    async def scenario() -> None:
        request, attempt = granted()
        lost = request.accept(Failed("r", 1, code, "why"))
        assert lost is (attempt if goes_on else None)
        assert request.broken == ({PLACEMENT} if goes_on else set())
        if not goes_on:
            with pytest.raises(Exception, match="why"):
                await request.chunk()

    asyncio.run(scenario())
