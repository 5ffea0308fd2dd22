"""Latency objectives, and which requests were within them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from splitserve.cluster.errors import InvalidRequest
from splitserve.deploy.bench.measure import Outcome


@dataclass(frozen=True)
class Slo:
    """The most that a request's first token (`ttft`) and each one after it (`tpot`) may take, in seconds."""

    ttft: float | None = None
    tpot: float | None = None

    def is_met(self, outcome: Outcome) -> bool:
        """Whether the request ended well, and in time."""
        if outcome.error is not None or not outcome.arrivals:
            return False
        found = (outcome.ttft_s, self.ttft), (outcome.tpot_s, self.tpot)
        return all(time is None or most is None or time <= most for time, most in found)

    def __str__(self) -> str:
        given = {field.name.upper(): getattr(self, field.name) for field in fields(self)}
        return " and ".join(f"{name} {most * 1e3:g} ms" for name, most in given.items() if most is not None)


def parse_slo(text: str) -> Slo:
    """`ttft=SECONDS`, `tpot=SECONDS` or both, with a comma between. Raises InvalidRequest for anything else."""
    given = dict(part.strip().partition("=")[::2] for part in text.split(","))
    try:
        seconds = {name: float(value) for name, value in given.items()}
    except ValueError:
        seconds = {}
    if (
        not seconds
        or not set(seconds) <= {"ttft", "tpot"}
        or not all(0 < most < float("inf") for most in seconds.values())
    ):
        raise InvalidRequest("slo", text, "give seconds, as in ttft=0.5,tpot=0.05")
    return Slo(**seconds)
