"""A whole cluster on one GPU, over gRPC, against its engine alone: DeepSeek-V2-Lite's shapes, random weights, greedy.

    python -m benchmarks.gpu_serve

Both answer the same load: requests sent at once, until the last one has all its tokens.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.gpu_decode import TOPOLOGY
from benchmarks.rows import Figure, Row, write
from splitserve.client import AsyncClient
from splitserve.cluster.topology import Topology
from splitserve.deploy.bench.engine import EngineAlone
from splitserve.models.resolve import CONFIG_ONLY

BATCH, PROMPT_TOKENS, ANSWER_TOKENS, ROUNDS = 64, 1024, 256, 4
ADDRESS = "127.0.0.1:50091"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        topology = describe(folder)
        with multiprocessing.get_context("spawn").Pool(1) as own:
            alone = own.apply(measure_engine, (topology,))
        cluster = measure_cluster(folder, topology)
    tokens = BATCH * ANSWER_TOKENS
    rates = [tokens / seconds for seconds in cluster]
    peer = median(tokens / seconds for seconds in alone)
    case = f"v2lite-bf16 {BATCH} x {PROMPT_TOKENS} + {ANSWER_TOKENS} tokens, one GPU"
    write([Row("serve", case, "throughput", "tokens/s", Figure.of(rates), "the engine alone", peer, "higher")])


def describe(folder: Path) -> dict[str, Any]:
    """A topology whose model is a folder: the config, and a tokenizer that is never asked for more than bytes."""
    shutil.copy(CONFIG_ONLY["deepseek-v2-lite"], folder / "config.json")
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    model = TOPOLOGY["model"] | {"path": str(folder), "name": "v2lite"}  # type: ignore[operator]
    return TOPOLOGY | {"name": "bench-gpu-serve", "model": model, "router": {"grpc": ADDRESS}, "hosts": {"gpus": 1}}


def measure_engine(topology: dict[str, Any]) -> list[float]:
    engine = EngineAlone(Topology.model_validate(topology))
    return [engine.serve_s(BATCH, PROMPT_TOKENS, ANSWER_TOKENS) for _ in range(ROUNDS + 1)][1:]


def measure_cluster(folder: Path, topology: dict[str, Any]) -> list[float]:
    file = folder / "topology.yaml"
    file.write_text(yaml.safe_dump(topology))
    splitserve("up", str(file))
    try:
        return [asyncio.run(seconds_for(seed)) for seed in range(ROUNDS + 1)][1:]
    finally:
        splitserve("down", topology["name"])


def splitserve(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "splitserve", *arguments], check=True, stdout=subprocess.DEVNULL)


async def seconds_for(seed: int) -> float:
    dice = random.Random(seed)
    prompts = [dice.choices(range(100_000), k=PROMPT_TOKENS) for _ in range(BATCH)]
    async with AsyncClient(ADDRESS) as client:
        began = time.perf_counter()
        streams = [client.generate(prompt, max_tokens=ANSWER_TOKENS, ignore_eos=True) for prompt in prompts]
        completions = await asyncio.gather(*(stream.result() for stream in streams))
        seconds = time.perf_counter() - began
    assert all(len(completion.samples[0].token_ids) == ANSWER_TOKENS for completion in completions)
    return seconds


if __name__ == "__main__":
    main()
