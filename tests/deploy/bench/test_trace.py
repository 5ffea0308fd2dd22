"""Recorded loads: what is read, what is made of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from splitserve.client import Model
from splitserve.cluster.errors import InvalidRequest
from splitserve.deploy.bench.load import LoadShape
from splitserve.deploy.bench.trace import BLOCK_TOKENS, read_trace
from splitserve.deploy.bench.workload import Workload

VOCABULARY = 1000


def line(at_ms: float, prompt: int, answer: int = 4, blocks: list[int] | None = None) -> dict[str, Any]:
    return {"timestamp": at_ms, "input_length": prompt, "output_length": answer, "hash_ids": blocks}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Three requests out of order; the first two share 512 tokens, and one is long."""
    lines = [line(3000, 600, blocks=[7, 9]), line(1000, 700, blocks=[7, 8]), line(2000, 5000), line(2500, 30)]
    (path := tmp_path / "trace.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_a_trace_is_replayed_in_its_order_and_at_its_speed(file: Path) -> None:
    trace = read_trace(str(file), context=2048, count=None)
    assert [request.input_length for request in trace.requests] == [700, 30, 600]
    assert trace.left_out == 1
    assert trace.arrivals(speed=1.0) == [0.0, 1.5, 2.0]
    assert trace.arrivals(speed=4.0) == [0.0, 0.375, 0.5]


def test_equal_blocks_are_equal_tokens_and_others_are_not(file: Path) -> None:
    trace = read_trace(str(file), 2048, None)
    early, alone, late = (request.prompt for request in trace.prompts(VOCABULARY, seed=1))
    assert [len(early), len(alone), len(late)] == [700, 30, 600]
    assert early[:BLOCK_TOKENS] == late[:BLOCK_TOKENS]
    assert early[BLOCK_TOKENS:600] != late[BLOCK_TOKENS:]
    assert alone != early[:30]
    assert all(0 <= token < VOCABULARY for token in (*early, *alone, *late))
    assert [request.prompt for request in trace.prompts(VOCABULARY, seed=1)] == [early, alone, late]
    assert next(iter(trace.prompts(VOCABULARY, seed=2))).prompt != early


def test_as_many_as_are_asked_are_taken_from_the_front(file: Path) -> None:
    assert [request.input_length for request in read_trace(str(file), 10_000, count=2).requests] == [700, 600]


def test_a_workload_sends_the_trace(file: Path) -> None:
    workload = Workload(LoadShape("16", "4"), warmup=3, trace=str(file), speed=2.0)
    load = workload.load(Model("m", 2048, VOCABULARY))
    assert (len(load.warmup), load.count, load.left_out, load.arrivals) == (3, 3, 1, (0.0, 0.75, 1.0))
    assert [len(request.prompt) for request in load.requests] == [700, 30, 600]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "line 1: Invalid JSON"),
        ("[1]", "line 1: Input should be an object"),
        ('\n{"timestamp": 1, "input_length": 5}', "line 2: output_length: Field required"),
        (json.dumps(line(-1, 5)), "line 1: timestamp: Input should be greater than or equal to 0"),
        (json.dumps(line(1, 0)), "line 1: input_length: Input should be greater than or equal to 1"),
        (json.dumps(line(1, 5, answer=10**9)), "output_length: Input should be less than or equal to"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 5}', "timestamp: Input should be a finite number"),
        (json.dumps(line(1, 5, blocks=[-1])), "hash_ids.0: Input should be greater than or equal to 0"),
        (json.dumps(line(1, 513, blocks=[1])), "hash_ids: a prompt of 513 tokens needs one for every 512 tokens"),
        ("", "it has no requests: name a file with one a line"),
        (json.dumps(line(1, 2045)), "it has no request that fits into the model's 2,048 tokens"),
    ],
)
def test_what_cannot_be_replayed_is_told_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    (path := tmp_path / "trace.jsonl").write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        read_trace(str(path), 2048, None)
    assert told in str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="No such file or directory: name a readable file"):
        read_trace(str(tmp_path / "absent"), 2048, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("requests", 0),
        ("requests", 10**12),
        ("warmup", -1),
        ("concurrency", 10**12),
        ("seed", -1),
        ("rate", 0.0),
        ("speed", float("nan")),
    ],
)
def test_odd_workloads_are_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"{field}: found {value}; give"):
        Workload(LoadShape("16", "4"), **{field: value})  # type: ignore[arg-type]
