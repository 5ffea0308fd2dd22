"""Placement: which prefill and which decode engine a request gets. Pure functions of what the router knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Policy = Literal["round_robin", "least_load"]


@dataclass(frozen=True)
class EngineView:
    """One engine that can take requests. `load` counts the requests it runs or has waiting."""

    engine: str
    role: Literal["prefill", "decode", "colocated"]
    load: int


def place(
    prefills: Sequence[EngineView], decodes: Sequence[EngineView], policy: Policy, counter: int
) -> tuple[EngineView, EngineView]:
    """Choose (prefill, decode), neither list being empty. `counter` grows by one per choice.

    A colocated engine does both itself.

    >>> idle, busy = EngineView("decode/0/0", "decode", 1), EngineView("decode/1/0", "decode", 7)
    >>> place([EngineView("prefill/0/0", "prefill", 0)], [busy, idle], "least_load", 0)[1].engine
    'decode/0/0'
    """
    choose = {"round_robin": _round_robin, "least_load": _least_load}[policy]
    decode = choose(decodes, counter)
    return (decode if decode.role == "colocated" else choose(prefills, counter)), decode


def _round_robin(engines: Sequence[EngineView], counter: int) -> EngineView:
    return engines[counter % len(engines)]


def _least_load(engines: Sequence[EngineView], counter: int) -> EngineView:
    """The least loaded; of equals, the next in turn."""
    turns = (engines[(counter + turn) % len(engines)] for turn in range(len(engines)))
    return min(turns, key=lambda engine: engine.load)
