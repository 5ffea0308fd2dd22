"""Runs batches on one rank: a model, its KV cache, and nothing of scheduling."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from splitserve.engine.batch import Batch, to_tensors
from splitserve.engine.kv_cache import KvCache
from splitserve.models.decoder import Decoder


class ModelRunner:
    """One rank's model over its pages in `cache`."""

    def __init__(self, model: Decoder, cache: KvCache, device: torch.device) -> None:
        self.cache = cache
        self.model = model
        self._device = device

    @torch.inference_mode()
    def run(self, batch: Batch, on_layers: Callable[[range], None] | None = None) -> torch.Tensor:
        """Write the batch's KV and return the logits [wanted rows, vocab] float32, in the batch's order.

        [0, 0] when none are wanted. `on_layers` is called as soon as the KV of a range of layers is in the cache.
        """
        tensors = to_tensors(batch, self.cache.layout.page_size, self._device)
        hidden = self.model.forward(
            tensors.token_ids, tensors.positions, self.cache.layers, tensors.metadata, tensors.slot_mapping, on_layers
        )
        if not any(batch.num_logits):
            return hidden.new_empty((0, 0), dtype=torch.float32)
        return self.model.logits(hidden[tensors.logit_rows])

    @torch.inference_mode()
    def copy_pages(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole pages, (source, destination) each."""
        self.cache.copy_pages(pairs)
