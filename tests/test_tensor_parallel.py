"""Engines of any TP, in either pool, answer what one rank answers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

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


def test_prefixes_come_back_from_the_host_memory_of_all_ranks(tmp_path: Path) -> None:
    folder, expected = write_tiny_moe(tmp_path), list[tuple[int, ...]]()
    pool: dict[str, Any] = {"kv_memory": "640KiB", "page_size": 16}
    for tp in (1, 2):
        sized = pool | {"layout": {"tp": tp}}
        with running(topology(folder, prefill=sized, decode=sized)) as client:
            for round_ in range(2):
                for number in range(6):
                    prompt = random.Random(number).choices(range(3, 300), k=900)
                    result = client.generate(prompt, max_tokens=8, ignore_eos=True).result()
                    expected.append(result.samples[0].token_ids)
                    assert result.summary.usage.cached_tokens == (896 if round_ else 0)
    assert expected[:6] * 4 == expected


def check_layouts(folder: Path, layouts: list[tuple[int, int]]) -> None:
    expected = answers(folder, 1, 1)
    assert all(len(tokens) == 24 for tokens in expected)
    for prefill_tp, decode_tp in layouts:
        assert answers(folder, prefill_tp, decode_tp) == expected, f"TP {prefill_tp} to TP {decode_tp}"
