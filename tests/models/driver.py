"""The smallest way to run a model: its own pages, chunked prefill, then all sequences decoded together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from splitserve.engine.kv_cache import KvCache
from splitserve.kernels.paged_attention import AttentionMetadata
from splitserve.models.config import Dtype, ModelConfig
from splitserve.models.decoder import Decoder
from splitserve.models.layers import TensorParallel

PAGE_SIZE = 32
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence that are to run, the first at position `start`."""

    sequence: int
    start: int
    token_ids: list[int]


class Driver:
    """Runs up to `sequences` sequences of up to `max_tokens` tokens."""

    def __init__(
        self,
        model: Decoder,
        config: ModelConfig,
        tp: TensorParallel,
        sequences: int,
        max_tokens: int,
        device: torch.device = CPU,
    ) -> None:
        pages = -(-max_tokens // PAGE_SIZE)
        dtype: Dtype = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
        self._model, self._device = model, device
        self.cache = KvCache(config.kv_layout(tp.size, PAGE_SIZE, dtype), sequences * pages, device)
        # Pages of a sequence lie apart and backwards, so that nothing works by chance.
        self.tables = torch.arange(sequences * pages).view(pages, sequences).T.flip(1)

    @torch.inference_mode()
    def run(self, spans: Sequence[Span]) -> torch.Tensor:
        """Logits [spans, vocab] after the last token of each span."""
        lengths = torch.tensor([len(span.token_ids) for span in spans])
        positions = torch.cat([torch.arange(span.start, span.start + len(span.token_ids)) for span in spans])
        tables = self.tables[[span.sequence for span in spans]]
        owner = torch.arange(len(spans)).repeat_interleave(lengths)
        slots = tables[owner, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        starts = torch.tensor([span.start for span in spans])
        metadata = AttentionMetadata(*(each.to(self._device) for each in (lengths, starts + lengths, tables)))
        token_ids = torch.tensor([token for span in spans for token in span.token_ids])
        token_ids, positions, slots = (each.to(self._device) for each in (token_ids, positions, slots))
        hidden = self._model.forward(token_ids, positions, self.cache.layers, metadata, slots)
        return self._model.logits(hidden[lengths.cumsum(0) - 1])


def greedy(driver: Driver, prompts: list[list[int]], num_tokens: int, chunk: int = 100) -> list[list[int]]:
    """`num_tokens` greedy tokens after each prompt."""
    answers: list[list[int]] = []
    for index, prompt in enumerate(prompts):
        for start in range(0, len(prompt), chunk):
            logits = driver.run([Span(index, start, prompt[start : start + chunk])])
        answers.append([int(logits.argmax())])
    for done in range(1, num_tokens):
        spans = [Span(index, len(prompt) + done - 1, answers[index][-1:]) for index, prompt in enumerate(prompts)]
        for answer, token in zip(answers, driver.run(spans).argmax(-1).tolist(), strict=True):
            answer.append(token)
    return answers
