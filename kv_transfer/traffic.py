"""What a rank has sent, by transport."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Literal

from splitserve.cluster.counts import TransferCounts, Transport

Event = Literal["started", "completed", "failed", "cancelled", "bytes"]


class Traffic:
    """Counts what happens to transfers; `ended` counts those that are over, however they ended."""

    def __init__(self) -> None:
        self._counts: defaultdict[Transport, Counter[str]] = defaultdict(Counter)
        self.ended = 0

    def count(self, transport: Transport, event: Event, amount: int = 1) -> None:
        self._counts[transport][event] += amount
        self.ended += event in ("completed", "failed", "cancelled")

    def counts(self) -> tuple[TransferCounts, ...]:
        """All that was counted so far."""
        return tuple(TransferCounts(transport, **counts) for transport, counts in sorted(self._counts.items()))


def total(counts: Iterable[TransferCounts]) -> tuple[TransferCounts, ...]:
    """One entry for each transport: the sums of all of its entries."""
    sums: dict[Transport, Counter[str]] = {}
    for one in counts:
        sums.setdefault(one.transport, Counter()).update(
            started=one.started, completed=one.completed, failed=one.failed, cancelled=one.cancelled, bytes=one.bytes
        )
    return tuple(TransferCounts(transport, **sums[transport]) for transport in sorted(sums))
