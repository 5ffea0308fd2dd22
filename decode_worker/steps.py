"""How an engine's leader runs decode steps: at once and logits in hand, or ahead of the device and one step late."""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch

from splitserve.cluster.messages import TokenLogprobs
from splitserve.decode_worker.device_loop import LaunchStep, PendingStep, RowResult
from splitserve.engine.batch import Batch, Chunk
from splitserve.engine.block_manager import BlockTable
from splitserve.engine.ranks import Ranks, RunBatch
from splitserve.engine.sampler import SampledToken, sample
from splitserve.engine.sequence import Sequence
from splitserve.engine.slot_state import SlotLayout, SlotUpdateBuilder

Outcome = tuple[Sequence, SampledToken | None]


class Steps(Protocol):
    """Runs decode steps of whatever sequences the scheduler names. Nothing waits for a device."""

    @property
    def under_way(self) -> int:
        """Steps whose results have not come."""

    @property
    def has_room(self) -> bool:
        """Whether another step may be launched behind those under way."""

    def launch(self, running: list[Sequence]) -> bool:
        """Start a step of `running`, who have pages for it; False when none of them needs one."""

    def results(self) -> list[Outcome]:
        """What steps came to since the last call; None where the model failed."""


class StepwiseSteps:
    """Every step is a batch like any other, and its tokens are there when it ends. For CPUs."""

    under_way, has_room = 0, True

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._outcomes: list[Outcome] = []
        self._unmasked: dict[Sequence, torch.Tensor] = {}  # logits of those whose mask has not come

    def launch(self, running: list[Sequence]) -> bool:
        """Masks are computed while the model runs; whose is late then is sampled after a later step."""
        fresh = [sequence for sequence in running if sequence not in self._unmasked]
        rows = {sequence: self._unmasked[sequence] for sequence in running if sequence in self._unmasked}
        if fresh:
            logits = self._ranks.execute(RunBatch(Batch.of([Chunk(sequence, 1, 1) for sequence in fresh])))
            rows |= zip(fresh, logits, strict=True)
        ready = [sequence for sequence in rows if sequence.grammar is None or sequence.grammar.ready]
        if ready:
            of_all = logits if fresh == ready else torch.stack([rows[sequence] for sequence in ready])
            sampled = sample(of_all, [sequence.sampler_row() for sequence in ready])
            self._outcomes = list(zip(ready, sampled, strict=True))
        self._unmasked = {sequence: rows[sequence].clone() for sequence in rows.keys() - set(ready)}
        return bool(fresh or ready)

    def results(self) -> list[Outcome]:
        outcomes, self._outcomes = self._outcomes, []
        return outcomes


@dataclass(eq=False)
class _Place:
    """A sequence in its slot, and what the device knows: pages of its table, and at how many tokens its mask is."""

    slot: int
    sequence: Sequence
    table: BlockTable
    pages: int = 0
    mask_length: int = 0
    live: bool = True


class GraphSteps:
    """Steps are CUDA graphs that go on from state on the device; the host writes only what changed.

    Who is running is compared with who was: newcomers are admitted to free slots, those gone are freed, and new pages
    are told, in the update record of the next step. A constrained sequence runs only with its mask, which follows from
    the token before: in every other step. A result that comes for somebody who left meanwhile is dropped.
    """

    def __init__(self, ranks: Ranks, layout: SlotLayout, capacities: Seq[int], page_size: int) -> None:
        self._ranks, self._page_size = ranks, page_size
        self._capacities = sorted(capacities)
        self._updates = SlotUpdateBuilder(layout)
        self._free = list(range(layout.slots))
        self._places: dict[Sequence, _Place] = {}
        self._under_way: list[tuple[PendingStep, dict[int, _Place]]] = []
        self._launched = False
        self._next_step = 0

    @property
    def under_way(self) -> int:
        return len(self._under_way)

    @property
    def has_room(self) -> bool:
        """The device always has the next step waiting, and no third one: what it is told would be too old."""
        return len(self._under_way) < 2

    def launch(self, running: list[Sequence]) -> bool:
        self._vacate(running)
        for sequence in running:
            place = self._places.get(sequence) or self._admit(sequence)
            self._give_pages(place)
        ready = [place for place in self._places.values() if place.sequence.needs_step and self._has_mask(place)]
        self._launched = bool(ready)
        if not ready:
            return False
        capacity = next(capacity for capacity in self._capacities if capacity >= len(ready))
        top = any(place.sequence.params.logprobs for place in ready)
        pending = self._ranks.execute(LaunchStep(self._next_step, capacity, self._updates.take(), top))
        self._next_step += 1
        self._under_way.append((pending, {place.slot: place for place in ready}))
        for place in ready:
            place.sequence.in_flight += 1
        return True

    def results(self) -> list[Outcome]:
        outcomes: list[Outcome] = []
        while len(self._under_way) > self._launched and self._under_way[0][0].ready:
            pending, places = self._under_way.pop(0)
            came = {row.slot: row for row in pending.wait()}
            for slot, place in places.items():
                if not place.live:
                    continue
                place.sequence.in_flight -= 1
                if slot in came:
                    outcomes.append((place.sequence, _sampled(came[slot], place.sequence.params.logprobs)))
        return outcomes

    def _vacate(self, running: list[Sequence]) -> None:
        tables = {sequence: sequence.table for sequence in running}
        for sequence, place in list(self._places.items()):
            if tables.get(sequence) is place.table:
                continue
            del self._places[sequence]
            place.live = False
            sequence.in_flight = 0
            self._updates.set(place.slot, {"length": 0})
            heapq.heappush(self._free, place.slot)

    def _admit(self, sequence: Sequence) -> _Place:
        assert sequence.table is not None
        place = _Place(heapq.heappop(self._free), sequence, sequence.table)
        self._places[sequence] = place
        self._updates.sample_as(place.slot, sequence)
        self._updates.set(place.slot, {"last_token": sequence.token_ids[-1], "mask_length": 0})
        return place

    def _give_pages(self, place: _Place) -> None:
        pages = place.table.pages
        if len(pages) == place.pages:
            return
        self._updates.fill(place.slot, "block_table", pages[place.pages :], first=place.pages)
        place.pages = len(pages)
        room = min(place.pages * self._page_size, place.sequence.length_limit - 1)
        self._updates.set(place.slot, {"room": room})

    def _has_mask(self, place: _Place) -> bool:
        sequence, grammar = place.sequence, place.sequence.grammar
        if grammar is None:
            return True
        if sequence.in_flight or not grammar.ready:
            return False
        if place.mask_length != len(sequence.token_ids):
            place.mask_length = len(sequence.token_ids)
            self._updates.allow(place.slot, place.mask_length, grammar.mask)
        return True


def _sampled(row: RowResult, logprobs: int | None) -> SampledToken | None:
    if not row.finite:
        return None
    wanted = None if logprobs is None else TokenLogprobs(row.logprob, row.top[:logprobs])
    return SampledToken(row.token_id, wanted)
