"""What the ranks of a chaos run have in common: what they hold, and how it is checked."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import psutil
import torch

from splitserve.cluster.layout import KvLayout
from splitserve.engine.kv_cache import KvCache
from splitserve.kernels.kv_pack import KvRegion
from splitserve.kv_transfer.mover import Move, Mover

HOST = "127.0.0.1"
POISON = -7.0
MAX_LINKS = 4


@dataclass(frozen=True)
class Setup:
    """The ranks of a run. A prompt has `tokens` [least, most]; `devices` are by side and number."""

    cluster: str
    transport: Literal["cuda_ipc", "shm", "nccl", "tcp"]
    devices: Mapping[str, tuple[str, ...]]
    source: KvLayout
    target: KvLayout
    source_pages: int
    target_pages: int
    tokens: tuple[int, int]
    staging_bytes: int
    lease_s: float

    def prompt(self, transfer_id: str) -> tuple[int, list[int]]:
        """Its tokens, and the pages of every source that hold their KV."""
        chosen = random.Random(request_of(transfer_id))
        least, most = self.tokens
        tokens = round(least * (most / least) ** chosen.random())
        return tokens, chosen.sample(range(self.source_pages), -(-tokens // self.source.page_size))


@dataclass(frozen=True)
class RankState:
    """A rank's account of itself. `left` is what it holds of transfers; `links` has state and payloads by target."""

    left: str
    threads_and_files: tuple[int, int]
    when_warm: tuple[int, int] | None
    links: dict[str, tuple[str, int]] = field(default_factory=dict)
    links_made: int = 0


def threads_and_files() -> tuple[int, int]:
    process = psutil.Process()
    return process.num_threads(), process.num_fds()


def request_of(transfer_id: str) -> int:
    return int(transfer_id.partition("/")[0])


def source_cache(setup: Setup, device: torch.device) -> KvCache:
    """Words that follow from their place alone, on any device."""
    cache = KvCache(setup.source, setup.source_pages, device)
    for number, layer in enumerate(cache.layers):
        words = layer.view(torch.int32)
        places = torch.arange(words.numel(), dtype=torch.int64, device=device) + number * words.numel()
        words.copy_((((places * 0x2545F4914F6CDD1D) >> 24) & 0x7FFFFFFF).view(words.shape))
    return cache


def same_rows(left: KvCache, left_pages: list[int], right: KvCache, right_pages: list[int], tokens: int) -> bool:
    """Whether two sequences are the same to the bit."""
    pairs = zip(left.layers, right.layers, strict=True)
    here, there = (torch.tensor(pages, device=left.layers[0].device) for pages in (left_pages, right_pages))
    return all(torch.equal(_rows(mine, here, tokens), _rows(its, there, tokens)) for mine, its in pairs)


def _rows(layer: torch.Tensor, pages: torch.Tensor, tokens: int) -> torch.Tensor:
    """The bits of a sequence [planes, heads, tokens, words]."""
    return layer.view(torch.int32)[:, pages].transpose(1, 2).flatten(2, 3)[:, :, :tokens]


def warm_up(mover: Mover) -> None:
    """Each kind of move once: kernels are compiled at their first use. Page 0 stays as it is."""
    layout, device = mover.cache.layout, mover.cache.layers[0].device
    region = KvRegion((0, 1), (0, layout.heads_per_rank), (0, layout.page_size))
    for where in {device, torch.device("cpu")}:
        payload = torch.empty(layout.bytes_per_page // layout.num_layers, dtype=torch.uint8, device=where)
        table = mover.table([0], layout.page_size)
        _finish(mover, mover.pack(table, region, payload))
        _finish(mover, mover.unpack(table, region, payload, mover.mark()))


def _finish(mover: Mover, move: Move) -> None:
    mover.launch()
    while move.total() is None:
        time.sleep(0.001)
