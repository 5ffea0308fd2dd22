"""Brings one rank's model and KV pages into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from splitserve.cluster.rank_spec import RankSpec
from splitserve.cluster.topology_sections import DEFAULT_CHUNK_TOKENS
from splitserve.deploy.gpu_check import check_gpu
from splitserve.engine.kv_cache import KvCache, pages_for_budget
from splitserve.engine.runner import ModelRunner
from splitserve.engine.sequence import ModelLimits
from splitserve.models.config import ModelConfig
from splitserve.models.layers import TensorParallel
from splitserve.models.resolve import load_model_config, resolve_model
from splitserve.models.weights import load_model
from splitserve.prefill_worker.runner import PrefillRunner, supports_model


@dataclass(frozen=True)
class LoadedRank:
    """A model that can run, and what it sets."""

    config: ModelConfig
    runner: ModelRunner
    limits: ModelLimits


def load_rank(spec: RankSpec, group: TensorParallel, progress: Callable[[int, int], None] | None = None) -> LoadedRank:
    """Load the part of the model that `spec` names. Raises StartupError for a GPU that cannot, and ModelLoadError."""
    settings, pool = spec.topology.model, spec.topology.pool(spec.role)
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
    limits = ModelLimits(settings.context, config.vocab_size, frozenset(config.eos_token_ids))
    layout = config.kv_layout(spec.tp, pool.page_size, settings.dtype)
    cache = KvCache(layout, pages_for_budget(layout, pool.kv_memory), device)
    prefills = device.type == "cuda" and spec.role != "decode" and supports_model(config)
    chunk_tokens = pool.chunk_tokens or DEFAULT_CHUNK_TOKENS
    runner = PrefillRunner(model, cache, device, chunk_tokens) if prefills else ModelRunner(model, cache, device)
    return LoadedRank(config, runner, limits)
