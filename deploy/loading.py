"""Brings one rank's model and KV pages into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from splitserve.cluster.rank_spec import RankSpec
from splitserve.cluster.topology_sections import DEFAULT_CHUNK_TOKENS
from splitserve.deploy.cpu_check import check_cpu
from splitserve.deploy.gpu_check import check_gpu
from splitserve.engine.kv_cache import KvCache, pages_for_budget
from splitserve.engine.runner import ModelRunner
from splitserve.engine.sequence import ModelLimits
from splitserve.models.config import ModelConfig
from splitserve.models.decoder import Decoder
from splitserve.models.layers import TensorParallel
from splitserve.models.resolve import load_model_config, resolve_model
from splitserve.models.weights import load_model
from splitserve.prefill_worker.runner import PrefillRunner, supports_model


@dataclass(frozen=True)
class LoadedModel:
    """A rank's weights, which serve any role."""

    config: ModelConfig
    model: Decoder
    limits: ModelLimits

    def with_pages(self, spec: RankSpec) -> LoadedRank:
        """The model over the KV pages that the pool of `spec`'s role asks for."""
        pool, device = spec.topology.pool(spec.role), torch.device(spec.device)
        layout = self.config.kv_layout(spec.tp, pool.page_size, spec.topology.model.dtype)
        if device.type == "cpu":
            check_cpu(layout.head_dim)
        cache = KvCache(layout, pages_for_budget(layout, pool.kv_memory), device)
        prefills = device.type == "cuda" and spec.role != "decode" and supports_model(self.config)
        chunk_tokens = pool.chunk_tokens or DEFAULT_CHUNK_TOKENS
        runner = (
            PrefillRunner(self.model, cache, device, chunk_tokens)
            if prefills
            else ModelRunner(self.model, cache, device)
        )
        return LoadedRank(self.config, runner, self.limits)


@dataclass(frozen=True)
class LoadedRank:
    """A model that can run, and what it sets."""

    config: ModelConfig
    runner: ModelRunner
    limits: ModelLimits


def load_weights(
    spec: RankSpec, group: TensorParallel, progress: Callable[[int, int], None] | None = None
) -> LoadedModel:
    """Load the part of the model that `spec` names. Raises StartupError for a GPU that cannot, and ModelLoadError."""
    settings = spec.topology.model
    device = torch.device(spec.device)
    config = load_model_config(settings.path)
    if device.type == "cuda":
        check_gpu(spec, config)
    model = load_model(
        resolve_model(settings.path) if settings.load_format == "auto" else Path(),
        config,
        dtype=getattr(torch, settings.dtype),
        device=device,
        tp=group,
        load_format=settings.load_format,
        max_positions=settings.context,
        progress=progress,
        deterministic=settings.deterministic,
    )
    return LoadedModel(config, model, ModelLimits(settings.context, config.vocab_size, frozenset(config.eos_token_ids)))
