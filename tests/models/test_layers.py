"""Tensor parallelism over simulated ranks, and linear layers whose rows do not touch each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from splitserve.models.layers import SingleRank, TensorParallel, linear, pack
from splitserve.models.resolve import load_model_config
from splitserve.models.weights import load_model
from tests.models.driver import CPU, Driver, Span

TinyModels = Callable[[str], tuple[Path, Any]]


@dataclass
class Meeting:
    """Where the threads of a simulated group exchange tensors."""

    size: int
    parts: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._barrier = threading.Barrier(self.size, timeout=60)

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.parts[rank] = x.clone()
        self._barrier.wait()
        parts = [self.parts[other] for other in range(self.size)]
        self._barrier.wait()
        return parts


@dataclass(frozen=True)
class ThreadRank:
    meeting: Meeting
    rank: int

    @property
    def size(self) -> int:
        return self.meeting.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.meeting.exchange(self.rank, x)).sum(0)

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat(self.meeting.exchange(self.rank, x), dim)


def run_rank(folder: Path, tp: TensorParallel) -> torch.Tensor:
    """Logits of two sequences after a chunk each, after a second chunk, and after a decode step."""
    config = load_model_config(str(folder))
    model = load_model(folder, config, torch.float32, CPU, tp, "auto", max_positions=256)
    driver = Driver(model, config, tp, 2, 256)
    first, second = list(range(7, 120)), list(range(300, 260, -1))
    steps = [
        [Span(0, 0, first[:60]), Span(1, 0, second)],
        [Span(0, 60, first[60:]), Span(1, len(second), [5])],
        [Span(0, len(first), [9]), Span(1, len(second) + 1, [300])],
    ]
    return torch.cat([driver.run(spans) for spans in steps])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama", 2),
        ("llama", 4),
        ("llama-linear-rope-mqa", 3),
        ("qwen2", 4),
        ("qwen3", 3),
        ("llama3-rope-biases", 3),
        ("deepseek-v2-groups", 2),
        ("deepseek-v3", 4),
    ],
)
def test_ranks_together_are_the_whole_model(tiny: TinyModels, name: str, size: int) -> None:
    folder, _ = tiny(name)
    expected = run_rank(folder, SingleRank())
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(lambda rank: run_rank(folder, ThreadRank(meeting, rank)), range(size)))
    assert expected.std() > 0.05
    for result in results:
        torch.testing.assert_close(result, expected, atol=2e-4, rtol=1e-4)
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 12), (64, 17), (48, 23), (100, 24), (576, 960), (96, 301)])
def test_rows_of_linear_do_not_touch_each_other(inputs: int, outputs: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(inputs)
    x, weight = torch.randn(300, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    offset = torch.randn(outputs, generator=generator) if bias else None
    packed = pack(weight)
    whole = linear(x, packed, offset)
    torch.testing.assert_close(whole, torch.nn.functional.linear(x, weight, offset), atol=1e-4, rtol=1e-5)
    for start, stop in ((0, 0), (0, 1), (5, 7), (10, 13), (0, 4), (3, 20), (100, 164), (299, 300)):
        assert torch.equal(linear(x[start:stop], packed, offset), whole[start:stop])


@pytest.mark.parametrize("rows", [1, 3, 4, 50])
def test_bfloat16_linear_is_as_close_as_bfloat16_gets(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 96, generator=generator).bfloat16(), torch.randn(50_000, 96).bfloat16()
    offset = torch.randn(50_000).bfloat16()
    result = linear(x, weight, offset)
    assert result.dtype == torch.bfloat16
    expected = x.double() @ weight.double().T + offset.double()
    torch.testing.assert_close(result.double(), expected, atol=0.2, rtol=2**-7)
