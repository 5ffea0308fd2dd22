"""How fast an engine has been lately."""

from __future__ import annotations

import statistics
from collections.abc import Callable

KEPT = 0.9  # of what was seen before, with each new look


class BatchTimes:
    """What batches of tokens take that follow one another; the time between them does not count.

    Sizes within a factor of two are kept apart: many small batches must not hide what a large one takes. The first one
    of a size is not counted, as it may have had kernels to compile. `clock` gives seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._last_end = clock, 0.0
        self._begun: set[int] = set()  # lengths of numbers of tokens in bits
        self._means: dict[int, tuple[float, float]] = {}  # tokens and seconds, by that length

    def ended(self, tokens: int, began: float) -> None:
        """A batch that was launched at `began` has ended just now. It ran once the one before it had ended."""
        now, size = self._clock(), tokens.bit_length()
        if size in self._begun:
            seconds = now - max(began, self._last_end)
            known = self._means.get(size, (tokens, seconds))
            self._means[size] = _mixed(known[0], tokens), _mixed(known[1], seconds)
        self._begun.add(size)
        self._last_end = now

    @property
    def rested_s(self) -> float:
        """Seconds since the last batch ended."""
        return self._clock() - self._last_end

    @property
    def line(self) -> tuple[float, float]:
        """Seconds of any batch, and of each token more, by least squares; zeros before any is counted.

        While all have had about one size, tokens are taken to cost nothing: what is much larger is to be tried.
        """
        if len(self._means) < 2:
            return next(((seconds, 0.0) for _, seconds in self._means.values()), (0.0, 0.0))
        tokens, seconds = zip(*self._means.values(), strict=True)
        token_s, batch_s = statistics.linear_regression(tokens, seconds)
        if token_s < 0:
            return statistics.fmean(seconds), 0.0
        if batch_s < 0:
            return 0.0, statistics.linear_regression(tokens, seconds, proportional=True).slope
        return batch_s, token_s


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
        self.seconds = _mixed(self.seconds, now - self._since) if self.seconds else now - self._since
        self._since = now

    def rested(self) -> None:
        """No step is wanted."""
        self._since = 0.0


def _mixed(before: float, seen: float) -> float:
    return KEPT * before + (1 - KEPT) * seen
