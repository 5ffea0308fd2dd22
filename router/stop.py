"""Stop strings, found across deltas, with nothing shown that could still become part of one.

An Aho-Corasick automaton: its state after a text is the longest suffix of the text that begins some stop string. So
the state's depth is exactly what has to be held back, and a text costs amortised O(1) a character whatever the number
of stop strings (A. Aho, M. Corasick: Efficient string matching, 1975).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """The text of one sample, up to whichever stop string ends first (of several that end there: the longest).

    The result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._matched = [0]  # length of the longest stop string that ends in this state
        for stop in stops:
            self._insert(stop)
        self._fallback = [0] * len(self._next)
        self._link()
        self._state = 0
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be shown now. Sets `stopped` once a stop string is complete; later text is ignored."""
        if self.stopped:
            return ""
        held = self._held + text
        for position, character in enumerate(text, len(self._held) + 1):
            self._state = self._advance(self._state, character)
            if self._matched[self._state]:
                self.stopped = True
                self._held = ""
                return held[: position - self._matched[self._state]]
        shown = len(held) - self._depth[self._state]
        self._held = held[shown:]
        return held[:shown]

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._matched.append(0)
            state = self._next[state][character]
        self._matched[state] = len(stop)

    def _link(self) -> None:
        """Give every state that of its longest proper suffix, shorter states first."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, child in self._next[state].items():
                self._fallback[child] = self._advance(self._fallback[state], character)
                waiting.append(child)
            self._matched[state] = self._matched[state] or self._matched[self._fallback[state]]

    def _advance(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)
