"""A decode step for a number of live slots up to a capacity, captured as one CUDA graph.

    slots --gather--> rows --model--> logits --sampler--> tokens --finish--> slots, results     all of it on the device

The graph is captured for a capacity, not for a batch size: how many rows are live, and how long their contexts are,
kernels read on the device. Rows behind the live ones have length 0, load no expert and touch no page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from splitserve.engine.kv_cache import KvCache
from splitserve.engine.slot_state import SlotState
from splitserve.kernels.decode_attention import decode_attention
from splitserve.kernels.decode_plan import (
    DecodeShape,
    choose_tiles,
    new_decode_plan,
    new_decode_scratch,
    plan_decode,
)
from splitserve.kernels.launch import num_sms
from splitserve.kernels.sampling import new_sampled_rows, sample_rows
from splitserve.kernels.sampling_scratch import SamplerScratch
from splitserve.kernels.slot_rows import RESULT_WORDS, StepRows, finish_rows, gather_rows, new_step_rows
from splitserve.models.config import ModelConfig
from splitserve.models.decoder import Decoder

WARM_UPS = 2


class RowAttention:
    """The `Sequences` of a decode step: one query a row, for rows of at most `max_tokens` tokens in all."""

    def __init__(self, shape: DecodeShape, rows: StepRows, max_tokens: int, deterministic: bool) -> None:
        capacity, device = len(rows.slots), rows.slots.device
        self._rows = rows
        self._tiles = choose_tiles(shape, capacity, deterministic)
        self._plan = new_decode_plan(capacity, self._tiles.wave(shape, num_sms(device)), self._tiles.splits, device)
        self._scratch = new_decode_scratch(shape, self._tiles, capacity, max_tokens, device)

    def plan(self) -> None:
        """Plan the step for the rows as they are now."""
        plan_decode(self._rows.lengths, self._plan)

    def attend(
        self, q: torch.Tensor, cache_layer: torch.Tensor, scale: float, value_dim: int | None = None
    ) -> torch.Tensor:
        attended = decode_attention(
            q.unsqueeze(1).contiguous(),
            cache_layer,
            self._rows.block_table,
            self._rows.lengths,
            scale,
            self._plan,
            self._scratch,
            self._tiles,
            value_dim=value_dim,
        )
        return attended.squeeze(1)

    def live_rows(self, rows: int) -> torch.Tensor:
        return self._rows.live


class DecodeGraph:
    """The step of up to `capacity` of the slots in `state`, over the pages of `cache`.

    `results` [capacity, 4] int32 are what `kernels.slot_rows.finish_rows` reports of the last step, `sampled` the
    sampler's own. Rows have at most `max_tokens` tokens in all. Graphs that never run at once share `scratch` and a
    memory `pool`.
    On a CPU, where kernels run in Triton's interpreter, a replay runs the step itself.
    """

    def __init__(
        self,
        model: Decoder,
        config: ModelConfig,
        cache: KvCache,
        state: SlotState,
        capacity: int,
        max_tokens: int,
        scratch: SamplerScratch,
        pool: Any = None,
    ) -> None:
        device, layout = cache.layers[0].device, state.layout
        self._model, self._cache, self._state = model, cache, state
        self._max_tokens = min(max_tokens, capacity * layout.max_pages * cache.layout.page_size)
        self.rows = new_step_rows(capacity, layout.max_pages, device)
        self.sampled = new_sampled_rows(capacity, device)
        self.results = torch.full((capacity, RESULT_WORDS), -1, dtype=torch.int32, device=device)
        self._attention = RowAttention(decode_shape(config, cache), self.rows, self._max_tokens, model.deterministic)
        self._scratch = scratch
        self.replay: Callable[[], None] = self._capture(pool) if device.type == "cuda" else self.step
        self.capacity = capacity

    @torch.inference_mode()
    def step(self) -> None:
        """What is captured: one step, kernel by kernel."""
        rows = self.rows
        gather_rows(self._state.table, rows, self._cache.layout.page_size, self._max_tokens)
        self._attention.plan()
        hidden = self._model.forward(rows.tokens, rows.positions, self._cache.layers, self._attention, rows.cache_slots)
        logits = self._model.narrow_logits(hidden)
        sample_rows(
            logits, rows.slots, rows.next_positions, rows.live, self._state.sampler, self.sampled, self._scratch
        )
        sampled = self.sampled
        finish_rows(self._state.table, rows, sampled.tokens, sampled.finite, sampled.logprob, self.results)

    def _capture(self, pool: Any) -> Callable[[], None]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self.step()
        return graph.replay


def decode_shape(config: ModelConfig, cache: KvCache) -> DecodeShape:
    """What decode attention needs to know of one rank's layers."""
    layout, mla = cache.layout, config.mla
    return DecodeShape(
        heads=config.num_heads // layout.tp,
        kv_heads=layout.heads_per_rank,
        dim=layout.head_dim,
        value_dim=mla.kv_lora_rank if mla else layout.head_dim,
        page_size=layout.page_size,
    )
