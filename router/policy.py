"""Placement: which prefill and which decode engine a request gets. Pure functions of what the router knows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Policy = Literal["round_robin", "least_load"]


@dataclass(frozen=True)
class EngineView:
    """One engine that can take requests. `load` counts the requests it runs or has waiting."""

    engine: str
    role: Literal["prefill", "decode", "colocated"]
    load: int


class Placement(NamedTuple):
    """The engines of an attempt, by name; empty while there are none."""

    prefill: str = ""
    decode: str = ""


def place(
    prefills: Sequence[EngineView],
    decodes: Sequence[EngineView],
    policy: Policy,
    counter: int,
    linked: Collection[Placement] = (),
    broken: Collection[Placement] = (),
) -> Placement:
    """Choose engines, neither list being empty. `counter` grows by one per choice.

    `linked` are those that KV has gone between lately: by least load, of prefill engines that are equally loaded one
    that is linked with decode's engine comes first, so that few links are made. `broken` ones are
    chosen where there are no others. A colocated engine does both itself.

    >>> idle, busy = EngineView("decode/0/0", "decode", 1), EngineView("decode/1/0", "decode", 7)
    >>> place([EngineView("prefill/0/0", "prefill", 0)], [busy, idle], "least_load", 0).decode
    'decode/0/0'
    """
    if broken:
        decodes = [
            each for each in decodes if any((one.engine, each.engine) not in broken for one in prefills)
        ] or decodes
    decode = _in_turn(decodes if policy == "round_robin" else _least_loaded(decodes), counter)
    if broken:
        prefills = [one for one in prefills if (one.engine, decode.engine) not in broken] or prefills
    if policy == "round_robin":
        prefill = _in_turn(prefills, counter)
    else:
        least = _least_loaded(prefills)
        prefill = _in_turn([one for one in least if (one.engine, decode.engine) in linked] or least, counter)
    return Placement(decode.engine if decode.role == "colocated" else prefill.engine, decode.engine)


def _in_turn(engines: Sequence[EngineView], counter: int) -> EngineView:
    return engines[counter % len(engines)]


def _least_loaded(engines: Sequence[EngineView]) -> list[EngineView]:
    least = min(engine.load for engine in engines)
    return [engine for engine in engines if engine.load == least]
