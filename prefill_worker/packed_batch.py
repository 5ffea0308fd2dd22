"""A batch as one buffer of numbers, so that one copy brings all of it to a GPU.

    | live | token ids | positions | slots | tiles | pages | logit rows |        int64, each part padded to its size

A CUDA graph is captured for fixed `Sizes`; what a smaller batch leaves of them is filled with rows that do no work.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt
import torch

from splitserve.engine.batch import Batch
from splitserve.kernels.prefill_attention import KEY_TILE, query_tiles

Ints = npt.NDArray[np.int64]
SLOTS = 3  # the part of slots, padded with -1


@dataclass(frozen=True)
class Sizes:
    """Room for `tokens`, `tiles` of queries and `pages` of contexts."""

    tokens: int
    tiles: int
    pages: int

    def hold(self, other: Sizes) -> bool:
        return all(mine >= theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))

    @property
    def parts(self) -> list[int]:
        """Numbers in each part of the buffer; even, so that all parts are aligned alike and compile one kernel."""
        tokens = self.tokens + self.tokens % 2
        return [2, tokens, tokens, tokens, 4 * self.tiles, 2 * self.pages, tokens]


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """A `buffer` and its parts on a device: int64, but for `live` [1] int32, the number of rows that count.

    `token_ids`, `positions`, `slots` (-1 for padding) and `logit_rows` [tokens], `tiles` [tiles, 4] as of
    `query_tiles`, and `pages` [pages, 2] as for `gather_pages`.
    """

    buffer: torch.Tensor
    live: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    tiles: torch.Tensor
    pages: torch.Tensor
    logit_rows: torch.Tensor

    @classmethod
    def empty(cls, sizes: Sizes, device: torch.device) -> DeviceBatch:
        """Rows that do no work."""
        batch = cls.of(torch.zeros(sum(sizes.parts), dtype=torch.int64, device=device), sizes)
        batch.slots.fill_(-1)
        return batch

    @classmethod
    def of(cls, buffer: torch.Tensor, sizes: Sizes) -> DeviceBatch:
        live, token_ids, positions, slots, tiles, pages, logit_rows = torch.split(buffer, sizes.parts)
        return cls(
            buffer=buffer,
            live=live.view(torch.int32)[:1],
            token_ids=token_ids[: sizes.tokens],
            positions=positions[: sizes.tokens],
            slots=slots[: sizes.tokens],
            tiles=tiles.view(-1, 4),
            pages=pages.view(-1, 2),
            logit_rows=logit_rows[: sizes.tokens],
        )


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A batch's numbers on the host, the parts of the buffer in their order."""

    sizes: Sizes
    num_logits: int
    numbers: tuple[Ints, ...]

    def buffer(self, sizes: Sizes, pinned: bool) -> torch.Tensor:
        """The buffer, padded to `sizes`."""
        buffer = torch.empty(sum(sizes.parts), dtype=torch.int64, pin_memory=pinned)
        parts = np.split(buffer.numpy(), np.cumsum(sizes.parts)[:-1])
        for index, (part, numbers) in enumerate(zip(parts, self.numbers, strict=True)):
            part[: numbers.size] = numbers.ravel()
            part[numbers.size :] = -1 if index == SLOTS else 0
        return buffer


def pack_batch(batch: Batch, page_size: int) -> PackedBatch:
    """Expand `batch`. A sequence's context takes whole pages, and zeros up to a multiple of KEY_TILE rows."""
    lens, starts, num_pages = (np.array(each, np.int64) for each in (batch.query_lens, batch.starts, batch.num_pages))
    pages, contexts = np.array(batch.pages, np.int64), starts + lens
    first_page = np.cumsum(num_pages) - num_pages

    owner, offset = _count_up(lens)
    positions = starts[owner] + offset
    slots = pages[first_page[owner] + positions // page_size] * page_size + positions % page_size
    wanted = offset >= (lens - np.array(batch.num_logits))[owner]

    entries = -(-(-(-contexts // KEY_TILE) * KEY_TILE) // page_size)
    context, index = _count_up(entries)
    used = np.clip(contexts[context] - index * page_size, 0, page_size)
    page = pages[first_page[context] + np.minimum(index, num_pages[context] - 1)]
    tiles = query_tiles(lens, starts, (np.cumsum(entries) - entries) * page_size)

    tokens = np.array(batch.token_ids, np.int64)
    logit_rows = np.flatnonzero(wanted)
    return PackedBatch(
        Sizes(len(tokens), len(tiles), len(page)),
        len(logit_rows),
        (np.array([len(tokens)]), tokens, positions, slots, tiles, np.stack((page, used), axis=1), logit_rows),
    )


def _count_up(counts: Ints) -> tuple[Ints, Ints]:
    """(2, 3) -> (0, 0, 1, 1, 1) and (0, 1, 0, 1, 2)."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
