"""What a rank has sent, by transport."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from splitserve.cluster.counts import TransferCounts, Transport

Event = Literal["started", "completed", "failed", "cancelled", "bytes"]


class Traffic:
    """Counts what happens to transfers; `ended` counts those that are over, however they ended."""

    def __init__(self) -> None:
        self._counts: dict[Transport, Counter[str]] = {}
        self.ended = 0

    def count(self, transport: Transport, event: Event, amount: int = 1) -> None:
        self._counts.setdefault(transport, Counter())[event] += amount
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
