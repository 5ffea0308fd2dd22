"""When a sequence ends, and why."""

from __future__ import annotations

from typing import Any

import pytest

from splitserve.cluster.messages import FinishReason, SampleToken, TokenLogprobs
from splitserve.cluster.sampling import SamplingParams
from splitserve.engine.sequence import Sequence

EOS, STOP, WORD = 2, 9, 5


def sequence(prompt: int = 4, max_model_len: int = 100, **params: Any) -> Sequence:
    return Sequence(
        request_id="r",
        attempt=0,
        sample=0,
        token_ids=[WORD] * prompt,
        prompt_tokens=prompt,
        params=SamplingParams(**params),
        eos_token_ids=frozenset({EOS}),
        max_model_len=max_model_len,
    )


@pytest.mark.parametrize(
    ("params", "tokens", "reason"),
    [
        ({}, [WORD] * 10, None),
        ({}, [WORD, EOS], "stop"),
        ({}, [STOP], None),
        ({"stop_token_ids": (STOP,)}, [WORD, STOP], "stop"),
        ({"ignore_eos": True}, [EOS, EOS], None),
        ({"ignore_eos": True, "stop_token_ids": (EOS,)}, [EOS], "stop"),
        ({"max_tokens": 3}, [WORD] * 3, "length"),
        ({"max_tokens": 3}, [WORD, WORD, EOS], "stop"),
        ({"max_tokens": 1}, [WORD], "length"),
        ({"min_tokens": 2}, [EOS, EOS, EOS], "stop"),
        ({"min_tokens": 3}, [EOS, EOS, EOS], None),
        ({"max_model_len": 7}, [WORD] * 3, "length"),
        ({"max_model_len": 8, "max_tokens": 9}, [WORD] * 3, None),
    ],
)
def test_finish_reason(params: dict[str, Any], tokens: list[int], reason: FinishReason | None) -> None:
    found = sequence(**params)
    expected = [None] * (len(tokens) - 1) + [reason]
    assert [found.take(token).finish_reason for token in tokens] == expected
    assert found.finish_reason == reason
    assert found.output_tokens == len(tokens)


def test_a_taken_token_is_announced_with_its_position() -> None:
    found, logprobs = sequence(prompt=6), TokenLogprobs(-0.5, ())
    assert found.take(WORD) == SampleToken("r", 0, 0, 6, WORD)
    assert found.take(EOS, logprobs) == SampleToken("r", 0, 0, 7, EOS, "stop", logprobs)


def test_pending_tokens_are_those_without_kv() -> None:
    found = sequence(prompt=6)
    assert found.pending_tokens == 6
    found.computed_tokens = 6
    found.take(WORD)
    assert found.pending_tokens == 1


def test_tokens_of_an_earlier_attempt_are_output() -> None:
    found = sequence(max_tokens=4)
    found.token_ids += [WORD, WORD]
    row = found.sampler_row()
    assert (row.position, list(row.output_ids)) == (6, [WORD, WORD])
    assert [found.take(WORD).finish_reason for _ in range(2)] == [None, "length"]
