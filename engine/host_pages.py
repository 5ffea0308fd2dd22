"""Which place in host memory holds which page. Pure bookkeeping of an engine's leader; `HostTier` holds the bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

from splitserve.engine.prefix_log import PrefixLog

Pairs = Sequence[tuple[int, int]]
Move = Callable[[Pairs, Pairs], object]


class HostPages:
    """`capacity` places on every rank. `move(saves, loads)` copies pages: each (page, place), then each (place, page).

    Parked sequences keep their places until they are loaded or dropped. Cached pages, known by their digests, go when
    room is needed, least recently used first.
    """

    def __init__(self, capacity: int, move: Move) -> None:
        self.capacity = capacity
        self.move = move
        self._free = list(range(capacity - 1, -1, -1))
        self._place_of: OrderedDict[bytes, int] = OrderedDict()
        self.prefixes = PrefixLog()

    @property
    def cached(self) -> int:
        """Cached pages that lie here."""
        return len(self._place_of)

    @property
    def used(self) -> int:
        """Places that hold a page."""
        return self.capacity - len(self._free)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._place_of

    def park(self, pages: Sequence[int]) -> list[int] | None:
        """Save `pages`, and return their places; None when there is no room."""
        if len(pages) > len(self._free) + len(self._place_of):
            return None
        places = [self._free.pop() if self._free else self._evict(next(iter(self._place_of))) for _ in pages]
        self.move(list(zip(pages, places, strict=True)), ())
        return places

    def unpark(self, places: Sequence[int], pages: Sequence[int]) -> None:
        """Load what was parked at `places` into `pages`, in the same order, and forget it."""
        self.move((), list(zip(places, pages, strict=True)))
        self.drop(places)

    def drop(self, places: Sequence[int]) -> None:
        """Forget what was parked at `places`."""
        self._free.extend(places)

    def find(self, digest: bytes) -> int | None:
        """The place of a cached page, which now is the one used last."""
        if digest in self._place_of:
            self._place_of.move_to_end(digest)
        return self._place_of.get(digest)

    def keep(self, digest: bytes, spared: Collection[int]) -> int | None:
        """The place to save a cached page to that leaves; None where it lies here already, or nothing may go for it.

        Pages at the places in `spared` do not go.
        """
        if self.find(digest) is not None:
            return None
        if self._free:
            place = self._free.pop()
        else:
            victim = next((known for known, place in self._place_of.items() if place not in spared), None)
            if victim is None:
                return None
            place = self._evict(victim)
        self._place_of[digest] = place
        self.prefixes.add(digest)
        return place

    def _evict(self, digest: bytes) -> int:
        self.prefixes.remove(digest)
        return self._place_of.pop(digest)
