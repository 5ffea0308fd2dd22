"""Which prefixes an engine has cached, and how that changed, for routers that follow it.

    router                                      engine
      | Heartbeat(prefix_version=0) --------------->|
      |<------- PrefixUpdate(since=0, version=41)   |   all that is cached
      | Heartbeat(prefix_version=41) -------------->|
      |<------- PrefixUpdate(since=41, version=44)  |   what came and went since; nothing is said where nothing did

A router says what it knows and hears the rest, so a lost message costs one heartbeat, and engines know no routers.
"""

from __future__ import annotations

from collections import Counter, deque
from itertools import islice

from splitserve.cluster.messages import PrefixUpdate

KEPT_CHANGES = 1 << 16  # a router that has missed more hears of everything anew


class PrefixLog:
    """Counts, for each digest, the places where its page lies: in a GPU's memory, the host's, or both."""

    def __init__(self) -> None:
        self.version = 0
        self._places: Counter[bytes] = Counter()
        self._changes: deque[bytes] = deque(maxlen=KEPT_CHANGES)

    def add(self, digest: bytes) -> None:
        self._places[digest] += 1
        if self._places[digest] == 1:
            self._change(digest)

    def remove(self, digest: bytes) -> None:
        self._places[digest] -= 1
        if not self._places[digest]:
            del self._places[digest]
            self._change(digest)

    def update(self, engine: str, incarnation: str, since: int) -> PrefixUpdate | None:
        """What a router that knows version `since` lacks; None where that is nothing."""
        if since == self.version:
            return None
        if not self.version - len(self._changes) <= since <= self.version or not since:
            return PrefixUpdate(engine, incarnation, 0, self.version, b"".join(self._places), b"")
        changed = set(islice(reversed(self._changes), self.version - since))
        stored = [digest for digest in changed if digest in self._places]
        evicted = [digest for digest in changed if digest not in self._places]
        return PrefixUpdate(engine, incarnation, since, self.version, b"".join(stored), b"".join(evicted))

    def _change(self, digest: bytes) -> None:
        self.version += 1
        self._changes.append(digest)
