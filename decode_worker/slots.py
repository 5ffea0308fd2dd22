"""Which sequences run in the next step: slots, pages, and parking when pages run out."""

from __future__ import annotations

from collections import deque

from splitserve.engine.block_manager import BlockManager
from splitserve.engine.sequence import Sequence


class Slots:
    """Sequences that decode: running ones in slots, ready ones in line, parked ones in host memory.

    When a sequence needs a page and none is free, the one that joined last is parked: its pages go to the host tier
    and come back, unchanged, before anything that joined after it runs.
    """

    def __init__(self, blocks: BlockManager, slots: int) -> None:
        self._blocks, self._slots = blocks, slots
        self._running: list[Sequence] = []
        self._ready: deque[Sequence] = deque()
        self._parked: deque[Sequence] = deque()
        self._places: dict[Sequence, list[int]] = {}
        self.preemptions = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._ready) + len(self._parked)

    @property
    def parked(self) -> int:
        return len(self._parked)

    def add(self, sequence: Sequence) -> None:
        self._ready.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is and free its pages."""
        if sequence in self._parked:
            self._parked.remove(sequence)
            self._blocks.host.drop(self._places.pop(sequence))
            return
        (self._running if sequence in self._running else self._ready).remove(sequence)
        assert sequence.table is not None
        self._blocks.free(sequence.table)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step, each with a page for its next token, oldest first."""
        while self._parked and len(self._running) < self._slots and self._restore(self._parked[0]):
            self._running.append(self._parked.popleft())
        while self._ready and not self._parked and len(self._running) < self._slots:
            self._running.append(self._ready.popleft())
        # A sequence that finds no page parks others that joined after it, or itself: never one scheduled already.
        return [sequence for sequence in list(self._running) if sequence in self._running and self._grow(sequence)]

    def stuck(self) -> Sequence | None:
        """The sequence to give up when no running one could be scheduled: every page is taken, the host tier full."""
        return self._running[-1] if self._running else None

    def _grow(self, sequence: Sequence) -> bool:
        assert sequence.table is not None
        while not self._blocks.append(sequence.table, sequence.tokens_to_hold):
            victim = self._running[-1]
            if not self._park(victim):
                return False
            if victim is sequence:
                return False
        return True

    def _park(self, sequence: Sequence) -> bool:
        assert sequence.table is not None
        written = sequence.table.pages[: self._blocks.pages_for(sequence.computed_tokens)]
        places = self._blocks.host.park(written)
        if places is None:
            return False
        self._places[sequence] = places
        self._blocks.free(sequence.table)
        self._running.remove(sequence)
        self._parked.appendleft(sequence)
        self.preemptions += 1
        return True

    def _restore(self, sequence: Sequence) -> bool:
        """Bring a parked sequence back if its pages and one for its next token are free."""
        if self._blocks.pages_for(len(sequence.token_ids)) > self._blocks.free_pages:
            return False
        written = sequence.token_ids[: sequence.computed_tokens]
        table = self._blocks.allocate(written, sequence.extra_keys, max_cached_tokens=0)
        assert table is not None
        self._blocks.host.unpark(self._places.pop(sequence), table.pages)
        sequence.table = table
        return True
