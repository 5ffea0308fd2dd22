"""Which sequences run in the next step: slots, pages, and parking when pages run out."""

from __future__ import annotations

from collections import deque

from splitserve.engine.block_manager import BlockManager
from splitserve.engine.sequence import Sequence


class Slots:
    """Sequences that decode: running ones in slots, and those in line for one, with their KV in pages or parked.

    When a running sequence needs a page and none is free, the one that joined last is parked: its pages go to the host
    tier and come back, unchanged, before anything that joined after it runs. Those in line are parked for others too:
    the last ones first, for prompts that come and for whoever is before them.
    """

    def __init__(self, blocks: BlockManager, slots: int) -> None:
        self._blocks, self._slots = blocks, slots
        self._running: list[Sequence] = []
        self._line: deque[Sequence] = deque()
        self._places: dict[Sequence, list[int]] = {}
        self._preempted: set[Sequence] = set()
        self.preemptions = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def parked(self) -> int:
        return len(self._places)

    @property
    def preempted(self) -> int:
        """Those that ran before, and wait for pages."""
        return len(self._preempted)

    def add(self, sequence: Sequence) -> None:
        self._line.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is and free its pages."""
        (self._running if sequence in self._running else self._line).remove(sequence)
        self._preempted.discard(sequence)
        if sequence in self._places:
            self._blocks.host.drop(self._places.pop(sequence))
            return
        assert sequence.table is not None
        self._blocks.free(sequence.table)

    def make_room(self, pages: int, before: Sequence | None = None) -> bool:
        """Park from the end of the line, as far as `before`, until `pages` are free; False where they are not then."""
        for sequence in reversed(list(self._line)):
            if self._blocks.free_pages >= pages or sequence is before:
                break
            if sequence not in self._places and not self._park(sequence):
                break
        return self._blocks.free_pages >= pages

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step, each with a page for its next token, oldest first."""
        while self._line and len(self._running) < self._slots and self._restore(self._line[0]):
            self._running.append(self._line.popleft())
        # A sequence that finds no page parks others that joined after it, or itself: never one scheduled already.
        return [sequence for sequence in list(self._running) if sequence in self._running and self._grow(sequence)]

    def stuck(self) -> Sequence | None:
        """The sequence to give up when none could be scheduled: every page is taken, the host tier full."""
        if self._running:
            return self._running[-1]
        return next((sequence for sequence in reversed(self._line) if sequence not in self._places), None)

    def _grow(self, sequence: Sequence) -> bool:
        assert sequence.table is not None
        while not self._blocks.append(sequence.table, sequence.tokens_to_hold):
            if self.make_room(self._blocks.free_pages + 1):
                continue
            victim = self._running[-1]
            if not self._park(victim):
                return False
            self._running.remove(victim)
            self._line.appendleft(victim)
            self._preempted.add(victim)
            self.preemptions += 1
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
        return True

    def _restore(self, sequence: Sequence) -> bool:
        """Whether the KV of the first in line is in pages: a parked one comes back once they and one more are free."""
        if sequence not in self._places:
            return True
        if not self.make_room(self._blocks.pages_for(len(sequence.token_ids)), before=sequence):
            return False
        written = sequence.token_ids[: sequence.computed_tokens]
        table = self._blocks.allocate(written, sequence.extra_keys, max_cached_tokens=0)
        assert table is not None
        self._blocks.host.unpark(self._places.pop(sequence), table.pages)
        self._preempted.discard(sequence)
        sequence.table = table
        return True
