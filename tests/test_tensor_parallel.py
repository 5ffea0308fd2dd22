"""Engines of any TP, in either pool, answer what one rank answers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.tiny_model import write_tiny_model, write_tiny_moe
from tests.worker_threads import running, topology

PROMPTS = [random.Random(seed).choices(range(3, 300), k=length) for seed, length in enumerate((5, 70, 200))]


def answers(folder: Path, prefill_tp: int, decode_tp: int) -> list[tuple[int, ...]]:
    with running(topology(folder, prefill_tp=prefill_tp, decode_tp=decode_tp)) as client:
        streams = [client.generate(prompt, max_tokens=24, ignore_eos=True) for prompt in PROMPTS]
        return [stream.result().samples[0].token_ids for stream in streams]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "layouts"),
    [(9, 3, [(3, 1), (1, 3), (3, 3)]), (4, 2, [(2, 1), (1, 4), (4, 2), (2, 4)])],
    ids=["smollm2-heads", "replicated-kv-heads"],
)
def test_any_layout_answers_alike(tmp_path: Path, heads: int, kv_heads: int, layouts: list[tuple[int, int]]) -> None:
    check_layouts(write_tiny_model(tmp_path, heads=heads, kv_heads=kv_heads), layouts)


def test_latents_and_experts_in_any_layout(tmp_path: Path) -> None:
    check_layouts(write_tiny_moe(tmp_path), [(2, 1), (1, 4), (4, 2)])


def check_layouts(folder: Path, layouts: list[tuple[int, int]]) -> None:
    expected = answers(folder, 1, 1)
    assert all(len(tokens) == 24 for tokens in expected)
    for prefill_tp, decode_tp in layouts:
        assert answers(folder, prefill_tp, decode_tp) == expected, f"TP {prefill_tp} to TP {decode_tp}"
