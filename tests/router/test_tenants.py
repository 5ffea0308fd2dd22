"""What the holder of a key may take, over a clock of the test's own."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from splitserve.cluster.api_key_file import ApiKey, hash_key
from splitserve.cluster.errors import InvalidRequest, Overloaded
from splitserve.router.policy import ANSWER_TOKENS
from splitserve.router.tenants import Tenant, Tenants


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def tenant(clock: Clock, **limits: int) -> Tenant:
    return Tenant("alice", ApiKey(sha256=hash_key("k"), **limits), clock)


def refused(tenant: Tenant) -> float:
    """When to come back."""
    with pytest.raises(Overloaded) as caught, tenant.request(1):
        pass
    assert "alice has" in str(caught.value)
    return caught.value.retry_after_s


def test_requests_flow_in_by_the_minute(clock: Clock) -> None:
    alice = tenant(clock, requests_per_minute=30)
    for _ in range(30):
        with alice.request(10_000):
            pass
    assert refused(alice) == pytest.approx(2.0)
    clock.now += 1.5
    assert refused(alice) == pytest.approx(0.5)
    clock.now += 0.5
    with alice.request(1):
        pass
    assert refused(alice) == pytest.approx(2.0)
    clock.now += 3600
    for _ in range(30):
        with alice.request(1):
            pass
    assert refused(alice) == pytest.approx(2.0), "no more than a minute's worth gathers"


def test_tokens_of_prompts_and_answers_count(clock: Clock) -> None:
    alice = tenant(clock, tokens_per_minute=600)
    with alice.request(100):
        alice.take_tokens(499)
    with alice.request(300):  # one was left
        pass
    assert refused(alice) == pytest.approx(30.0)
    clock.now += 29.9
    assert refused(alice) == pytest.approx(0.1)
    clock.now += 0.2
    with alice.request(1):
        pass


def test_what_is_refused_costs_nothing(clock: Clock) -> None:
    alice = tenant(clock, requests_per_minute=60, concurrent=1)
    with alice.request(1):
        for _ in range(100):
            assert refused(alice) == 1.0
    for _ in range(59):
        with alice.request(1):
            pass
    assert refused(alice) == pytest.approx(1.0)


def test_running_requests_are_bounded_and_come_free_however_they_end(clock: Clock) -> None:
    alice = tenant(clock, concurrent=2)
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(alice.request(1))
        assert refused(alice) == 1.0
    with pytest.raises(KeyError), alice.request(1):
        raise KeyError
    with alice.request(1), alice.request(1):
        refused(alice)


def test_every_answer_of_a_request_is_one_under_way(clock: Clock) -> None:
    alice = tenant(clock, concurrent=4, requests_per_minute=60)
    with alice.request(1, answers=3):
        with pytest.raises(Overloaded, match="alice has 3 answers under way of 4"), alice.request(1, answers=2):
            pass
        with alice.request(1):
            assert refused(alice) == 1.0
    with pytest.raises(InvalidRequest, match="n: found '5 answers'; alice may have 4"), alice.request(1, answers=5):
        pass


def test_what_needs_no_engine_is_a_request_too(clock: Clock) -> None:
    alice = tenant(clock, requests_per_minute=2)
    alice.take_request()
    alice.check()
    alice.take_request()
    for ask in (alice.take_request, alice.check):
        with pytest.raises(Overloaded, match="no requests left"):
            ask()


def test_answers_are_taken_to_be_as_long_as_those_of_late(clock: Clock) -> None:
    alice = tenant(clock)
    assert (alice.answer_tokens(None), alice.answer_tokens(10)) == (ANSWER_TOKENS, 10)
    for _ in range(100):
        alice.answered(20.0)
    assert alice.answer_tokens(1000) == alice.answer_tokens(None) == pytest.approx(20.0, abs=0.1)
    assert alice.answer_tokens(10) == 10


def test_without_a_file_everybody_may(clock: Clock) -> None:
    anybody = Tenants(None, clock).find(None)
    with ExitStack() as running:
        for _ in range(10_000):
            running.enter_context(anybody.request(10**9))
            anybody.take_tokens(10**9)
    assert anybody.name == ""
    assert Tenants(None).find("Bearer whatever").name == ""
