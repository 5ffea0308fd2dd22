"""Engines on a GPU never wait for it: while it works, their sockets are read and the next work is launched."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from splitserve.cluster.sampling import SamplingParams
from tests.engines import InProcessCluster, Settings
from tests.tiny_model import write_tiny_moe

pytestmark = pytest.mark.gpu


def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    """Short and long prompts, samples, penalties, a preemption: torch raises where a call would wait."""
    write_tiny_moe(tmp_path)
    settings = Settings(
        split=False, chunk_tokens=256, capacities=(16,), graph_tokens=(64,), device="cuda", dtype="bfloat16", pages=60
    )
    cluster = InProcessCluster(tmp_path, settings)
    dice = random.Random(0)

    def ask(round_: int) -> None:
        for number, length in enumerate((5, 60, 200, 300, 40, 90)):
            params = SamplingParams(
                max_tokens=60, ignore_eos=True, n=1 + number % 2, temperature=0.7, repetition_penalty=1.1, seed=number
            )
            cluster.ask(f"{round_}-{number}", dice.choices(range(3, 300), k=length), params)

    ask(0)
    cluster.run()
    preempted = cluster.engines[0].stats().preemptions
    ask(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        answers = cluster.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(answer.failed is None for answer in answers.values())
    assert cluster.engines[0].stats().preemptions > preempted, "or nothing has gone to the host tier and back"
