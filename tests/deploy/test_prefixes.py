"""Prompts that begin alike, on two prefill workers: one computes the beginning, the other one fetches it."""

from __future__ import annotations

import asyncio
import random
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from splitserve.client import AsyncClient
from tests.deploy.clusters import left_behind, state_of, succeed, write_topology

DICE = random.Random(7)
BEGINNING = DICE.choices(range(3, 250), k=512)
PROMPTS = [[*BEGINNING, *DICE.choices(range(3, 250), k=200)] for _ in range(16)]
FETCHED = "splitserve_prefix_cache_fetched_tokens_total{"


async def salted(endpoint: str) -> list[tuple[int, bool]]:
    """The first token, and whether something of the prompt was cached, with one salt after the other."""
    found = []
    async with AsyncClient(endpoint) as client:
        for salt in ("Ann", "Ann", "Bob", "", "Bob"):
            completion = await client.generate([3, *BEGINNING], max_tokens=1, cache_salt=salt).result()
            found.append((completion.samples[0].token_ids[0], completion.summary.usage.cached_tokens > 0))
    return found


async def answers(endpoint: str) -> list[tuple[int, ...]]:
    async with AsyncClient(endpoint) as client:
        await client.generate([*BEGINNING, 3], max_tokens=1).result()
        await asyncio.sleep(2.5)  # until the router has heard who has it now
        streams = [client.generate(prompt, max_tokens=4, ignore_eos=True, timeout_s=60) for prompt in PROMPTS]
        completions = await asyncio.gather(*(stream.result() for stream in streams))
        await asyncio.sleep(1.5)
    return [completion.samples[0].token_ids for completion in completions]


Device = dict[str, dict[str, Any]]
POOL = {"device": "cuda", "gpu_fraction": 0.25}
CPU: Device = {"model": {"dtype": "float32"}}
GPU: Device = {
    "model": {"dtype": "bfloat16", "deterministic": True},
    "hosts": {"gpus": 1},
    "prefill": POOL,
    "decode": POOL,
}


@pytest.mark.parametrize("device", [pytest.param(CPU, id="cpu"), pytest.param(GPU, id="gpu", marks=pytest.mark.gpu)])
def test_a_beginning_is_computed_once(tmp_path: Path, tiny_model: Path, device: Device) -> None:
    found = []
    for replicas in (2, 1):
        file = write_topology(tmp_path, tiny_model, prefill=f"chunk_tokens: 16, replicas: {replicas}")
        settings = yaml.safe_load(file.read_text())
        for section, fields in device.items():
            settings[section] = settings.get(section, {}) | fields
        file.write_text(yaml.safe_dump(settings))
        succeed("up", file, timeout_s=180)
        state = state_of(settings["name"])
        try:
            found.append(asyncio.run(answers(state.endpoints[0])))
            tokens, cached = zip(*asyncio.run(salted(state.endpoints[0])), strict=True)
            assert len(set(tokens)) == 1
            assert cached == (False, True, False, False, True) or replicas == 2
            with urllib.request.urlopen(f"http://{settings['router']['http']}/metrics") as page:
                lines = [line for line in page.read().decode().splitlines() if line.startswith(FETCHED)]
            fetched = sum(float(line.split()[-1]) for line in lines)
            assert fetched % 64 == 0
            assert fetched >= len(BEGINNING) if replicas == 2 else not fetched
        finally:
            succeed("down", settings["name"])
        assert left_behind(state) == []
    assert found[0] == found[1]
