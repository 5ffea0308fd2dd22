from __future__ import annotations

import asyncio
import random
import tracemalloc

import pytest

from splitserve.cluster.errors import TransferFailed, WorkerUnavailable
from splitserve.cluster.messages import FinishReason, SampleToken, TokenLogprobs
from splitserve.router.output_buffer import Delta, OutputBuffer, SampleOutput
from tests.router.routers import tokenizer

START = 10


def token(position: int, token_id: int, reason: FinishReason | None = None, sample: int = 0) -> SampleToken:
    return SampleToken("r", 1, sample, START + position, token_id, reason, TokenLogprobs(-float(position), ()))


def output(stops: tuple[str, ...] = (), samples: int = 1) -> tuple[OutputBuffer, list[int]]:
    told: list[int] = []
    buffer = [SampleOutput(index, START, tokenizer().detokenizer(), stops) for index in range(samples)]
    return OutputBuffer(buffer, told.append), told


def joined(deltas: list[Delta]) -> tuple[str, list[int], list[float], str | None]:
    return (
        "".join(delta.text for delta in deltas),
        [token_id for delta in deltas for token_id in delta.token_ids],
        [entry.logprob for delta in deltas for entry in delta.logprobs],
        deltas[-1].finish_reason,
    )


@pytest.mark.parametrize("seed", range(20))
def test_any_order_with_duplicates_drained_at_any_moment_gives_the_same_text(seed: int) -> None:
    async def scenario() -> None:
        rng = random.Random(seed)
        ids = tokenizer().encode("the quick 🙂 brown fox 你好 " * 3)
        tokens = [
            token(index, token_id, "length" if index == len(ids) - 1 else None) for index, token_id in enumerate(ids)
        ]
        arrivals = tokens + rng.sample(tokens, 5)
        rng.shuffle(arrivals)
        buffer, _ = output()
        deltas: list[Delta] = []
        for arrival in arrivals:
            buffer.accept(arrival)
            if rng.random() < 0.3:
                deltas += await buffer.drain()
        while not buffer.drained:
            deltas += await buffer.drain()
        assert joined(deltas) == (tokenizer().decode(ids), ids, [-float(i) for i in range(len(ids))], "length")
        assert all(delta.finish_reason is None for delta in deltas[:-1])

    asyncio.run(scenario())


def test_tokens_of_a_slow_client_merge_into_one_delta_of_bounded_size() -> None:
    async def scenario() -> None:
        buffer, _ = output()
        word = tokenizer().encode("fox")[0]
        tracemalloc.start()
        for position in range(10_000):
            buffer.accept(token(position, word))
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        (delta,) = await buffer.drain()
        assert len(delta.token_ids) == 10_000
        assert grown < 4_000_000  # mostly this test's log probabilities

    asyncio.run(scenario())


def test_the_token_that_stops_a_sample_is_no_part_of_its_text() -> None:
    async def scenario() -> None:
        fox = tokenizer().encode("fox")
        buffer, told = output()
        for position, token_id in enumerate(fox):
            buffer.accept(token(position, token_id, "stop" if position == len(fox) - 1 else None))
        text, ids, _, reason = joined(await buffer.drain())
        assert (text, ids, reason) == (tokenizer().decode(fox[:-1]), fox, "stop")
        assert told == []

    asyncio.run(scenario())


def test_half_a_character_at_the_end_is_replaced_and_held_text_is_flushed() -> None:
    async def scenario() -> None:
        ids = [*tokenizer().encode("EN"), tokenizer().encode("汉")[0]]  # its first byte
        buffer, told = output(stops=("END",))
        for position, token_id in enumerate(ids):
            buffer.accept(token(position, token_id, "length" if position == len(ids) - 1 else None))
        assert joined(await buffer.drain())[0] == "EN\ufffd"
        assert told == []

    asyncio.run(scenario())


def test_a_stop_string_is_told_once_and_later_tokens_are_ignored() -> None:
    async def scenario() -> None:
        ids = tokenizer().encode("a STOP b")
        buffer, told = output(stops=("STOP",), samples=2)
        for position, token_id in enumerate(ids):
            buffer.accept(token(position, token_id, sample=1))
        text, taken, _, reason = joined(await buffer.drain())
        assert (text, reason, told) == ("a ", "stop", [1])
        assert len(taken) < len(ids)
        buffer.accept(token(len(ids), 5, sample=1))
        buffer.accept(token(0, 5, sample=0))
        assert [delta.index for delta in await buffer.drain()] == [0]
        assert not buffer.drained

    asyncio.run(scenario())


def test_an_error_comes_after_the_text_before_it_and_the_first_one_counts() -> None:
    async def scenario() -> None:
        buffer, _ = output()
        buffer.accept(token(0, 5))
        buffer.fail(TransferFailed("first"))
        buffer.fail(WorkerUnavailable("second"))
        assert len(await buffer.drain()) == 1
        with pytest.raises(TransferFailed, match="first"):
            await buffer.drain()

    asyncio.run(scenario())


def test_an_error_after_the_end_changes_nothing() -> None:
    async def scenario() -> None:
        buffer, _ = output()
        buffer.accept(token(0, 5, "length"))
        buffer.fail(WorkerUnavailable("late"))
        assert len(await buffer.drain()) == 1
        assert buffer.drained

    asyncio.run(scenario())


def test_a_sample_that_its_engine_gives_up_unasked_is_an_error() -> None:
    async def scenario() -> None:
        buffer, _ = output()
        buffer.accept(token(0, 5, "cancelled"))
        with pytest.raises(WorkerUnavailable, match="gave up sample 0"):
            await buffer.drain()

    asyncio.run(scenario())
