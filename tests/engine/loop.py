"""The smallest continuous batching there is: every live sequence runs its next chunk in every step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from splitserve.cluster.sampling import SamplingParams
from splitserve.engine.batch import Batch, Chunk
from splitserve.engine.block_manager import BlockManager, BlockTable
from splitserve.engine.kv_cache import KvCache
from splitserve.engine.runner import ModelRunner
from splitserve.engine.sampler import sample
from splitserve.engine.sequence import Sequence
from splitserve.models.config import ModelConfig
from splitserve.models.layers import TensorParallel
from splitserve.models.weights import load_model

CPU = torch.device("cpu")
CONTEXT = 512
CACHE_TOKENS = 16_384

Request = tuple[list[int], SamplingParams]
RunBatch = Callable[[Batch], torch.Tensor]


def make_runner(folder: Path, page_size: int, tp: TensorParallel) -> ModelRunner:
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    model = load_model(
        folder, config, dtype=torch.float32, device=CPU, tp=tp, load_format="auto", max_positions=CONTEXT
    )
    layout = config.kv_layout(tp.size, page_size, "float32")
    return ModelRunner(model, KvCache(layout, CACHE_TOKENS // page_size, CPU), CPU)


@dataclass(eq=False)
class Live:
    """One request under way: what it answered so far, token by token, with the logits behind each."""

    sequence: Sequence
    table: BlockTable
    logits: list[torch.Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.sequence.token_ids[self.sequence.prompt_tokens :]


class Loop:
    """Drives `run` over the pages of its own block manager."""

    def __init__(self, run: RunBatch, page_size: int) -> None:
        self.run = run
        self.blocks = BlockManager(CACHE_TOKENS // page_size, page_size)

    def answer(self, requests: list[Request], chunk_tokens: int = 512) -> list[Live]:
        """Run all `requests` to their ends, side by side."""
        answers = [self.start(*request) for request in requests]
        while live := [one for one in answers if one.sequence.finish_reason is None]:
            self.step(live, chunk_tokens)
        for one in answers:
            self.blocks.free(one.table)
        return answers

    def start(self, prompt: list[int], params: SamplingParams) -> Live:
        sequence = Sequence("r", 0, 0, list(prompt), len(prompt), params, frozenset({2}), CONTEXT)
        table = self.blocks.allocate(prompt)
        assert table is not None
        sequence.table, sequence.computed_tokens = table, table.cached_tokens
        return Live(sequence, table)

    def step(self, live: list[Live], chunk_tokens: int = 512) -> None:
        chunks, sampling = [], []
        for one in live:
            assert self.blocks.append(one.table, len(one.sequence.token_ids))
            size = min(one.sequence.pending_tokens, chunk_tokens)
            chunks.append(Chunk(one.sequence, size, int(size == one.sequence.pending_tokens)))
            sampling += [one] * chunks[-1].num_logits
        logits = self.run(Batch.of(chunks))
        for one, chunk in zip(live, chunks, strict=True):
            one.sequence.computed_tokens += chunk.num_tokens
            self.blocks.publish(one.table, one.sequence.token_ids, one.sequence.computed_tokens)
        if not sampling:
            return
        chosen = sample(logits, [one.sequence.sampler_row() for one in sampling])
        for one, row, token in zip(sampling, logits, chosen, strict=True):
            assert token is not None
            one.sequence.take(token.token_id)
            one.logits.append(row.clone())
