"""What is to happen to the ranks of a chaos run, and what came of it."""

from __future__ import annotations

import random
import re
from collections import Counter, deque
from dataclasses import dataclass, field

from tests.kv_transfer.chaos.member import Member
from tests.kv_transfer.chaos.rank import LONGEST_PASS


@dataclass(frozen=True)
class Fault:
    """At `at_s` of the run rank `number` of a `side` is killed, or stopped for `stop_s`."""

    at_s: float
    side: str
    number: int
    stop_s: float | None


def plan(seed: int, count: int, gap_s: tuple[float, float]) -> deque[Fault]:
    """As many of each kind, in random order, with random seconds in between."""
    chosen, at_s, faults = random.Random(seed), 0.0, deque[Fault]()
    kinds = [(("source", "target")[number % 2], number % 4 < 2) for number in range(count)]
    chosen.shuffle(kinds)
    for side, kill in kinds:
        at_s += chosen.uniform(*gap_s)
        faults.append(Fault(at_s, side, chosen.randrange(2), None if kill else chosen.uniform(1, 5)))
    return faults


@dataclass
class Report:
    """What happened. `disturbed` has the transfers under way of each fault's rank; counters are by side or reason."""

    faults: Counter[str] = field(default_factory=Counter)
    disturbed: list[int] = field(default_factory=list)
    killed_mid_copy: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    busy: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    sent: Counter[bool] = field(default_factory=Counter)  # by whether the link was up
    seconds: list[float] = field(default_factory=list)
    longest_pass: dict[str, float] = field(default_factory=lambda: {"source": 0.0, "target": 0.0})
    members: list[Member] = field(default_factory=list)

    def __str__(self) -> str:
        seconds, disturbed = sorted(self.seconds), sum(self.disturbed)
        links = [member.state.links_made for member in self.members if member.state and member.side == "source"]
        return "\n".join(
            (
                f"{dict(self.faults)}; frames under way at kills: {dict(self.killed_mid_copy)}",
                f"{len(seconds)} requests in {self.attempts} attempts, {disturbed} disturbed, {self.busy} busy",
                *(f"  {count} x {reason}" for reason, count in self.failures.most_common()),
                f"p50 {seconds[len(seconds) // 2]:.2f} s, p99 {seconds[len(seconds) * 99 // 100]:.2f} s",
                f"sent linked: {self.sent[True]}, not linked: {self.sent[False]}; links of those at the end: {links}",
                f"longest pass {self.longest_pass}",
            )
        )

    def note_longest_pass(self, member: Member) -> None:
        self.longest_pass[member.side] = max(self.longest_pass[member.side], member.gauges[LONGEST_PASS])

    def note_failure(self, side: str, reason: str) -> None:
        self.failures[f"{side}: " + re.sub(r"\S*\d\S*", "N", reason)] += 1
