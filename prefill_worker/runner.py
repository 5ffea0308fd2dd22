"""Runs prefill batches on a GPU: packed chunks, one copy to the device, no waiting for it.

Small batches replay a CUDA graph, because launching some hundreds of kernels would take the host longer than they take
the GPU. A graph is captured for a number of tokens and a size of contexts; all graphs share one pool of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from splitserve.engine.batch import Batch
from splitserve.engine.kv_cache import KvCache
from splitserve.engine.runner import ModelRunner
from splitserve.kernels.prefill_attention import QUERY_TILE, supports_heads
from splitserve.models.config import ModelConfig
from splitserve.models.decoder import Decoder
from splitserve.prefill_worker.packed_attention import PackedSequences
from splitserve.prefill_worker.packed_batch import DeviceBatch, PackedBatch, Sizes, pack_batch

GRAPH_TOKENS = (256, 512, 1024, 2048)
GRAPH_CONTEXTS = (2048, 16384)
GRAPH_SEQUENCES = 64


def supports_model(config: ModelConfig) -> bool:
    """Whether `PrefillRunner` has kernels for the widths of a model's heads."""
    mla = config.mla
    return supports_heads(*((mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim) if mla else [config.head_dim]))


class PrefillRunner(ModelRunner):
    """A `ModelRunner` for prefill on a GPU; steps of decode, chunks of one token each, are right but slow.

    Construction compiles kernels for batches of up to `max_tokens`, which thus are known to fit into memory, and
    captures graphs for `graph_tokens`, on engines of one rank only.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KvCache,
        device: torch.device,
        max_tokens: int,
        graph_tokens: Sequence[int] = GRAPH_TOKENS,
    ) -> None:
        super().__init__(model, cache, device)
        self._graphs: list[PrefillGraph] = []
        if device.type == "cuda":
            self._warm_up(max_tokens)
            for power in reversed(range(2, max_tokens.bit_length())):  # between which kernels keep their tiles
                self._warm_up(1 << power)
        if graph_tokens and cache.layout.tp == 1:
            self._capture(graph_tokens)

    @torch.inference_mode()
    def run(self, batch: Batch, on_layers: Callable[[range], None] | None = None) -> torch.Tensor:
        """As `ModelRunner.run`; with a graph, `on_layers` is called once, for all layers."""
        packed = pack_batch(batch, self.cache.layout.page_size)
        graph = next((graph for graph in self._graphs if graph.sizes.hold(packed.sizes)), None)
        if graph is None:
            buffer = packed.buffer(packed.sizes, pinned=self._device.type == "cuda").to(self._device, non_blocking=True)
            tensors = DeviceBatch.of(buffer, packed.sizes)
            hidden = forward(self.model, self.cache, tensors, on_layers)
        else:
            tensors, hidden = graph.batch, graph.replay(packed)
            if on_layers:
                on_layers(range(len(self.cache.layers)))
        if not packed.num_logits:
            return hidden.new_empty((0, 0), dtype=torch.float32)
        return self.model.logits(hidden[tensors.logit_rows[: packed.num_logits]])

    @torch.inference_mode()
    def _warm_up(self, tokens: int) -> None:
        sizes = Sizes(tokens, triton.cdiv(tokens, QUERY_TILE), triton.cdiv(tokens, self.cache.layout.page_size))
        hidden = forward(self.model, self.cache, DeviceBatch.empty(sizes, self._device))
        self.model.logits(hidden[:1])

    def _capture(self, graph_tokens: Sequence[int]) -> None:
        pool, page_size = torch.cuda.graph_pool_handle(), self.cache.layout.page_size
        for tokens in sorted(graph_tokens, reverse=True):  # the largest first: the others find room in its memory
            for context in sorted(GRAPH_CONTEXTS, reverse=True):
                rows = max(context, 2 * tokens)
                sizes = Sizes(tokens, triton.cdiv(tokens, QUERY_TILE) + GRAPH_SEQUENCES, triton.cdiv(rows, page_size))
                self._graphs.insert(0, PrefillGraph(self.model, self.cache, sizes, self._device, pool))


class PrefillGraph:
    """The forward pass for batches of up to `sizes`; `batch` is read by each replay."""

    def __init__(self, model: Decoder, cache: KvCache, sizes: Sizes, device: torch.device, pool: Any) -> None:
        self.sizes = sizes
        self.batch = DeviceBatch.empty(sizes, device)
        self._graph = torch.cuda.CUDAGraph()
        self._capture(model, cache, pool)

    def replay(self, packed: PackedBatch) -> torch.Tensor:
        """Run `packed`; returns the hidden states [tokens, hidden], to be read before the next replay."""
        self.batch.buffer.copy_(packed.buffer(self.sizes, pinned=True), non_blocking=True)
        self._graph.replay()
        return self._hidden

    @torch.inference_mode()
    def _capture(self, model: Decoder, cache: KvCache, pool: Any) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward(model, cache, self.batch)  # compiles kernels, which a capture cannot
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._hidden = forward(model, cache, self.batch)


def forward(
    model: Decoder, cache: KvCache, batch: DeviceBatch, on_layers: Callable[[range], None] | None = None
) -> torch.Tensor:
    """Hidden states [tokens, hidden]."""
    sequences = PackedSequences(batch)
    return model.forward(batch.token_ids, batch.positions, cache.layers, sequences, batch.slots, on_layers)
