"""How fast an engine has been lately."""

from __future__ import annotations

from collections.abc import Callable

KEPT = 0.9  # of what was seen before, with each new look


class Throughput:
    """Tokens a second of batches that follow one another; the time between them does not count.

    `clock` gives seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._last_end = clock, 0.0
        self._tokens = self._seconds = 0.0

    def batch_ended(self, tokens: int, began: float) -> None:
        """A batch that was launched at `began` has ended just now. It ran once the one before it had ended."""
        now = self._clock()
        self._tokens = KEPT * self._tokens + tokens
        self._seconds = KEPT * self._seconds + now - max(began, self._last_end)
        self._last_end = now

    @property
    def tokens_per_s(self) -> float:
        """0 before the first batch."""
        return self._tokens / self._seconds if self._seconds else 0.0


class StepTime:
    """Seconds from one decode step to the next one; the time in which none was wanted does not count."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._since = clock, 0.0
        self.seconds = 0.0

    def began(self) -> None:
        """A step has just begun."""
        self._since = self._since or self._clock()

    def ended(self) -> None:
        """A step has just ended."""
        now = self._clock()
        self.seconds = KEPT * self.seconds + (1 - KEPT) * (now - self._since) if self.seconds else now - self._since
        self._since = now

    def rested(self) -> None:
        """No step is wanted."""
        self._since = 0.0
