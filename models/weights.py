"""Fills a model with this rank's part of its weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from splitserve.cluster.errors import ModelLoadError
from splitserve.models.checkpoint import Checkpoint
from splitserve.models.config import ModelConfig
from splitserve.models.decoder import Decoder
from splitserve.models.layers import TensorParallel
from splitserve.models.parameters import Parameter, Shard, parameters

DUMMY_STD = 0.02

# Fills a tensor with a parameter's rows (or columns) from `start` on: fill(parameter, part, dim, start).
Fill = Callable[[Parameter, torch.Tensor, int, int], None]


def load_model(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    tp: TensorParallel,
    load_format: Literal["auto", "dummy"],
    max_positions: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    deterministic: bool = False,
) -> Decoder:
    """Build the model of `config` on `device` in `dtype` with weights from `folder`, or made up (`dummy`).

    `max_positions` is the longest context that will be run, by default the model's own. `progress(done, total)` is
    called after each of the weights. `deterministic`: see `Decoder`. Raises ModelLoadError naming the file or tensor.
    """
    if config.fp8_block:
        raise ModelLoadError("quantization_config: fp8 weights can be planned but not run yet; use bfloat16 ones")
    model = Decoder(config, tp, dtype, device, max_positions or config.max_position_embeddings, deterministic)
    if load_format == "dummy":
        fill_weights(model, config, tp, fill_dummy, progress)
    else:
        with Checkpoint(folder) as checkpoint:
            fill_weights(model, config, tp, fill_from(checkpoint), progress)
    model.pack_weights()
    return model


def fill_weights(
    model: Decoder,
    config: ModelConfig,
    tp: TensorParallel,
    fill: Fill,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill this rank's part of every weight, and the padding of the vocabulary with zeros."""
    views = dict(model.named_weights())
    for done, parameter in enumerate(parameters(config), 1):
        dim, start, stop = shard_range(parameter, config, tp.rank, tp.size)
        view = views.pop(parameter.name)
        fill(parameter, view.narrow(dim, 0, stop - start), dim, start)
        view.narrow(dim, stop - start, view.shape[dim] - (stop - start)).zero_()
        if progress:
            progress(done, done + len(views))


def fill_from(checkpoint: Checkpoint) -> Fill:
    """Fill from files; nothing beyond the part itself is read."""

    def fill(parameter: Parameter, part: torch.Tensor, dim: int, start: int) -> None:
        if parameter.shard is not Shard.EXPERTS:
            part.copy_(checkpoint.read(parameter.name, parameter.shape, dim, start, start + part.shape[dim]))
            return
        for expert, weight in enumerate(part, start):
            name = parameter.name.replace(".experts.", f".experts.{expert}.")
            weight.copy_(checkpoint.read(name, parameter.shape[1:], 0, 0, parameter.shape[1]))

    return fill


def fill_dummy(parameter: Parameter, part: torch.Tensor, dim: int, start: int) -> None:
    """Norms 1, all else normal; the same on every rank that holds the same part."""
    if parameter.name.endswith("norm.weight"):
        part.fill_(1)
    else:
        generator = torch.Generator(part.device).manual_seed(zlib.crc32(f"{parameter.name}/{start}".encode()))
        part.normal_(std=DUMMY_STD, generator=generator)


def shard_range(parameter: Parameter, config: ModelConfig, rank: int, size: int) -> tuple[int, int, int]:
    """(dimension, start, stop) of what TP `rank` of `size` holds of `parameter`.

    Raises ModelLoadError where the ranks cannot share it evenly.
    """
    rows = parameter.shape[0]
    match parameter.shard:
        case Shard.VOCAB:
            per_rank = -(-rows // size)
            return 0, min(rank * per_rank, rows), min((rank + 1) * per_rank, rows)
        case Shard.KV_HEADS:
            try:
                heads = config.kv_layout(size, 1, config.dtype).heads(rank)
            except ValueError as error:
                raise ModelLoadError(f"{parameter.name}: {error}") from error
            return 0, heads.start * config.head_dim, heads.stop * config.head_dim
        case Shard.ROWS | Shard.COLUMNS | Shard.EXPERTS as shard:
            dim = 1 if shard is Shard.COLUMNS else 0
            width, rest = divmod(parameter.shape[dim], size)
            if rest:
                raise ModelLoadError(f"{parameter.name}: {parameter.shape[dim]} do not divide over {size} ranks")
            return dim, rank * width, (rank + 1) * width
    return 0, 0, rows
