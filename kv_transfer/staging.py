"""Staging windows: the parts of a rank's receive buffer that are granted to transfers.

All ranks of an engine have staging areas of one size, and a transfer has the same window on each, so that the
engine's leader grants windows for all of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from splitserve.cluster.layout import KvLayout
from splitserve.kv_transfer.reshard import Piece

ALIGNMENT = 64
MAX_STAGING = 1 << 40
SLOTS = 4


@dataclass(frozen=True)
class FrameSizes:
    """Bytes of payloads: what is smaller than `least` waits for more while more is being computed."""

    least: int
    most: int


HOST_FRAMES = FrameSizes(1 << 20, 4 << 20)
# A frame costs both ends some half millisecond of host time, and within a host, where NCCL has 8 channels, it carries
# what is no larger than 64 MiB by 4 of them.
LINK_FRAMES = FrameSizes(65 << 20, 128 << 20)


@dataclass(frozen=True)
class Window:
    """Bytes [offset, offset + size) of a staging area."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size

    @property
    def is_possible(self) -> bool:
        """Whether some staging area could have it."""
        return self.offset >= 0 and self.offset % ALIGNMENT == 0 and self.size >= 0 and self.end <= MAX_STAGING

    def overlaps(self, other: Window) -> bool:
        return self.offset < other.end and other.offset < self.end

    def share(self, index: int, count: int) -> Window:
        """The `index`-th of `count` equal parts: each source rank writes only its own."""
        size = _align_down(self.size // count)
        return Window(self.offset + index * size, size)

    def slots(self, smallest: int, sizes: FrameSizes) -> tuple[Window, ...]:
        """Equal parts that take a frame each, of at least `smallest` bytes; none when not even one fits.

        Where frames may be large enough they are 1, 2 or 4, so that they take as many equal parts of all tokens.
        """
        count = max(fewest for fewest in (1, 2, SLOTS) if fewest == 1 or self.size // fewest >= sizes.least)
        size = max(_align_down(self.size // max(count, -(-self.size // sizes.most))), _align_up(smallest))
        return tuple(Window(self.offset + index * size, size) for index in range(self.size // size))


def window_share(plan: Sequence[Piece], piece: Piece, window: Window) -> Window:
    """The part of its target's `window` that the source of `piece` writes."""
    sources = [other.source_rank for other in plan if other.target_rank == piece.target_rank]
    return window.share(sources.index(piece.source_rank), len(sources))


def window_size(layout: KvLayout, num_tokens: int, source_tp: int, limit: int) -> int:
    """Bytes worth granting for `num_tokens` of a rank with `layout`: all of them in equal slots, at most `limit`.

    At least a slot a source rank, each big enough for one token of one layer.
    """
    smallest = _align_up(layout.bytes_per_token // layout.num_layers)
    slot = _align_up(layout.bytes_per_token * -(-num_tokens // (SLOTS * source_tp)))
    return max(_align_up(min(slot * SLOTS * source_tp, limit)), source_tp * smallest)


@dataclass
class WindowAllocator:
    """First-fit allocation of windows in `capacity` bytes of staging. An engine's leader owns one."""

    capacity: int
    _granted: list[Window] = field(default_factory=list)

    def allocate(self, size: int) -> Window | None:
        """A window of `size` bytes, aligned; None when no gap is wide enough."""
        size, offset = _align_up(size), 0
        for position, window in enumerate([*self._granted, Window(self.capacity, 0)]):
            if window.offset - offset >= size:
                granted = Window(offset, size)
                self._granted.insert(position, granted)
                return granted
            offset = window.end
        return None

    def release(self, window: Window) -> None:
        """Give `window` back, once every rank has reported it free. Raises ValueError when it is not granted."""
        if window not in self._granted:
            raise ValueError(f"window: found {window}; it is not granted")
        self._granted.remove(window)

    @property
    def granted_bytes(self) -> int:
        return sum(window.size for window in self._granted)


class EpochSource:
    """Hands out epochs: never twice in an engine's life, and unlike those of its earlier lives."""

    def __init__(self) -> None:
        self._last = secrets.randbits(30) << 32

    def next(self) -> int:
        self._last += 1
        return self._last


def _align_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _align_down(size: int) -> int:
    return size // ALIGNMENT * ALIGNMENT
