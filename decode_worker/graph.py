"""A decode step as one CUDA graph for a fixed number of slots, whatever the number of sequences in them.

    tokens, lengths, block table --replay--> next tokens, lengths + 1        all of it stays on the device

The graph is captured for a capacity, not for a batch size: how many slots are live, and how long their contexts are,
kernels read on the device. Live slots come first; idle ones have length 0, load no expert and touch no page.
"""

from __future__ import annotations

import torch

from splitserve.engine.kv_cache import KvCache
from splitserve.kernels.decode_attention import decode_attention
from splitserve.kernels.decode_plan import (
    DecodeShape,
    choose_tiles,
    new_decode_plan,
    new_decode_scratch,
    plan_decode,
)
from splitserve.kernels.launch import num_sms
from splitserve.models.config import ModelConfig
from splitserve.models.decoder import Decoder

WARM_UPS = 2


class SlotAttention:
    """The `Sequences` of a decode step: one query a slot."""

    def __init__(
        self, shape: DecodeShape, slots: int, max_pages: int, device: torch.device, deterministic: bool = False
    ) -> None:
        self._tiles = choose_tiles(shape, slots, deterministic)
        splits = self._tiles.splits
        programs = self._tiles.programs(shape, num_sms(device))
        self._plan = new_decode_plan(slots, programs, splits, device)
        self._scratch = new_decode_scratch(shape, splits, slots, slots * max_pages * shape.page_size, device)
        self.lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(slots, max_pages, dtype=torch.int32, device=device)
        self._live = torch.zeros(1, dtype=torch.int32, device=device)

    def begin_step(self) -> None:
        """Plan the step for what `lengths` says now."""
        plan_decode(self.lengths, self._plan)
        torch.sum(self.lengths > 0, dim=0, keepdim=True, dtype=torch.int32, out=self._live)

    def attend(
        self, q: torch.Tensor, cache_layer: torch.Tensor, scale: float, value_dim: int | None = None
    ) -> torch.Tensor:
        attended = decode_attention(
            q.unsqueeze(1).contiguous(),
            cache_layer,
            self.block_table,
            self.lengths,
            scale,
            self._plan,
            self._scratch,
            self._tiles,
            value_dim=value_dim,
        )
        return attended.squeeze(1)

    def live_rows(self, rows: int) -> torch.Tensor:
        return self._live


class DecodeGraph:
    """The captured step of `slots` slots, contexts of up to `max_pages` pages, greedy.

    `tokens` [slots] int64, `sequences.lengths` [slots] int32 (the tokens in the cache and the one to run) and
    `sequences.block_table` [slots, max_pages] int32 are read and, but for the table, moved on by each `replay`.
    """

    def __init__(self, model: Decoder, config: ModelConfig, cache: KvCache, slots: int, max_pages: int) -> None:
        layout, mla = cache.layout, config.mla
        device = cache.layers[0].device
        shape = DecodeShape(
            heads=config.num_heads // layout.tp,
            kv_heads=layout.heads_per_rank,
            dim=layout.head_dim,
            value_dim=mla.kv_lora_rank if mla else layout.head_dim,
            page_size=layout.page_size,
        )
        self._model, self._cache = model, cache
        self.sequences = SlotAttention(shape, slots, max_pages, device, model.deterministic)
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._graph = torch.cuda.CUDAGraph()
        self._capture()

    def replay(self) -> None:
        """Run one step; returns before it is done."""
        self._graph.replay()

    @torch.inference_mode()
    def _capture(self) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph):
            self.step()

    def step(self) -> None:
        """What is captured: one step, kernel by kernel."""
        lengths, page_size = self.sequences.lengths, self._cache.layout.page_size
        self.sequences.begin_step()
        positions = (lengths - 1).clamp_(min=0).long()
        pages = self.sequences.block_table.gather(1, (positions // page_size).unsqueeze(1)).squeeze(1)
        slots = torch.where(lengths > 0, pages * page_size + positions % page_size, -1)
        hidden = self._model.forward(self.tokens, positions, self._cache.layers, self.sequences, slots)
        self.tokens.copy_(self._model.narrow_logits(hidden).argmax(-1))
        lengths += (lengths > 0).int()
