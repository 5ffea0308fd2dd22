from __future__ import annotations

import random

import pytest

from splitserve.router.stop import StopMatcher


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Read character by character until some stop string ends; drop the longest that does."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def length_to_hold(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    beginnings = [stop[:length] for stop in stops for length in range(1, len(stop))]
    return max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)


def run(parts: list[str], stops: list[str]) -> tuple[list[str], bool]:
    matcher = StopMatcher(stops)
    shown = [matcher.push(part) for part in parts]
    return [*shown, matcher.finish()], matcher.stopped


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_of_any_text_gives_the_reference_and_never_shows_what_could_be_a_stop(seed: int) -> None:
    rng = random.Random(seed)
    stopped_runs = 0
    for _ in range(300):
        stops = ["".join(rng.choice("ab你") for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))]
        text = "".join(rng.choice("aab你c") for _ in range(rng.randrange(0, 30)))
        expected, stopped = reference(text, stops)
        matcher, shown, rest = StopMatcher(stops), "", text
        while rest:
            size = rng.randrange(1, 5)
            shown += matcher.push(rest[:size])
            rest = rest[size:]
            read = text.removesuffix(rest) if rest else text
            assert shown == (expected if matcher.stopped else read[: len(read) - length_to_hold(read, stops)])
        shown += matcher.finish()
        assert (shown, matcher.stopped) == (expected, stopped), (text, stops)
        stopped_runs += stopped
    assert stopped_runs > 50


def test_holds_back_exactly_what_could_become_a_stop() -> None:
    matcher = StopMatcher(["END", "NDX"])
    assert matcher.push("the EN") == "the "
    assert matcher.push("T") == "ENT"
    assert matcher.push("EEN") == "E"
    assert matcher.push("D of") == ""
    assert matcher.stopped
    assert matcher.push("more") == matcher.finish() == ""


def test_finish_shows_what_was_held() -> None:
    assert run(["almost EN"], ["END"]) == (["almost ", "EN"], False)


def test_falls_back_to_a_shorter_beginning() -> None:
    assert run(list("aabaaab"), ["aaab"]) == (["", "", "aab", "", "", "", "", ""], True)


def test_of_stops_that_end_together_the_longest_counts() -> None:
    assert run(["xabc"], ["bc", "abc", "c"]) == (["x", ""], True)
