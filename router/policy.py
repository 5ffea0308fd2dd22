"""Placement: which prefill and which decode engine a request gets. Pure functions of what the router knows."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from typing import Literal, NamedTuple

from splitserve.cluster.messages import EngineSpeed

Policy = Literal["kv_aware", "least_load", "round_robin"]

ANSWER_TOKENS = 128  # that an answer is taken to have: how many it will have, nobody knows
IDLE_ROWS = 16  # a decode step of this many rows takes about twice as long as one of one row
NEW_LINK_S = 0.005  # what KV may be late by when it is the first to go between two engines
FETCH_S = 0.005  # that a prefix from another engine takes, however short
FETCH_SPEEDUP = 4  # of a prefix that is fetched over one that is computed, until an engine has seen it
UNKNOWN = EngineSpeed(token_s=1.0)
STALE_S = 5.0  # after which an engine that computes nothing may be as fast as any other again
TIE_S = 0.002  # costs that differ by less are equal: engines take turns, and nothing is fetched


@dataclass(frozen=True)
class EngineView:
    """One engine that can take requests. `load` counts the requests it runs or has waiting.

    `placed` more of these than ended were placed since it last spoke, and `placed_tokens` more to compute than it has
    computed: either may be negative. `free_tokens` is the KV room that it has left, as it last said, and `slots` how
    many it decodes at once. One that `fetches` can have prefixes sent to it that other engines have cached.
    """

    engine: str
    role: Literal["prefill", "decode", "colocated"]
    load: int
    placed: int = 0
    placed_tokens: int = 0
    free_tokens: int = 0
    slots: int = 0
    speed: EngineSpeed = field(default_factory=EngineSpeed)
    fetches: bool = False

    @property
    def waiting_tokens(self) -> int:
        """That it has to compute before it begins with another prompt."""
        return max(self.speed.pending_tokens + self.placed_tokens, 0)


class Placement(NamedTuple):
    """The engines of an attempt, by name; empty while there are none."""

    prefill: str = ""
    decode: str = ""


class Fetch(NamedTuple):
    """The first `tokens` of a prompt, to be had from engine `holder`; of nobody where there is nothing."""

    holder: str = ""
    tokens: int = 0


NO_FETCH = Fetch()


@dataclass(frozen=True)
class Wanted:
    """What is to be placed: a prompt of `tokens`, of which engines have some `cached`, by name.

    Between pairs of `broken` its KV was lost before. The decode step should take at most `tpot_s` seconds.
    """

    tokens: int = 1
    cached: Mapping[str, int] = field(default_factory=dict)
    broken: Collection[Placement] = ()
    tpot_s: float = float("inf")

    def uncached(self, engine: str) -> int:
        """Tokens that `engine` would have to compute, or to receive."""
        return max(self.tokens - self.cached.get(engine, 0), 1)


def place(
    prefills: Sequence[EngineView],
    decodes: Sequence[EngineView],
    policy: Policy,
    counter: int,
    wanted: Wanted,
    linked: Collection[Placement] = (),
) -> Placement:
    """Choose engines, neither list being empty. `counter` grows by one per choice; engines that are equal take turns.

    `kv_aware` takes the decode engine that is predicted to be done first, then the prefill engine that is predicted to
    have the first token first; `least_load` those with the fewest requests. `linked` are pairs that KV has gone between
    lately: where it matters little one of them is taken, so that few links are made. Pairs of `wanted.broken` are
    chosen where there are no others. A colocated engine does both itself.

    >>> idle, busy = EngineView("decode/0/0", "decode", 1), EngineView("decode/1/0", "decode", 7)
    >>> place([EngineView("prefill/0/0", "prefill", 0)], [busy, idle], "least_load", 0, Wanted()).decode
    'decode/0/0'
    """
    broken = wanted.broken
    decodes = [each for each in decodes if any((one.engine, each.engine) not in broken for one in prefills)] or decodes
    decode = _cheapest(decodes, _decode_costs(policy, decodes, wanted), counter)
    if decode.role == "colocated":
        return Placement(decode.engine, decode.engine)
    prefills = [one for one in prefills if (one.engine, decode.engine) not in broken] or prefills
    near = {one.engine for one in prefills if (one.engine, decode.engine) in linked}
    prefill = _cheapest(prefills, _prefill_costs(policy, prefills, wanted, near), counter)
    return Placement(prefill.engine, decode.engine)


def predicted_ttfts(prefills: Sequence[EngineView], wanted: Wanted) -> dict[str, tuple[float, Fetch]]:
    """Seconds to the first token on each prefill engine, and what it should fetch for that.

    It computes what waits there and then what it lacks of the prompt, or fetches some of that, while it computes what
    waits, from the engine that has most cached. An engine that has computed nothing yet, or nothing lately, is taken to
    be as fast as the fastest: a slow one is tried again. Where all are new, it is tokens in place of seconds.
    """
    seen = [one.speed for one in prefills if one.speed.is_known]
    typical = min(seen, key=lambda speed: speed.batch_s + speed.batch_tokens * speed.token_s, default=UNKNOWN)
    most = max(starmap(Fetch, wanted.cached.items()), key=lambda most: most.tokens, default=NO_FETCH)
    times = {}
    for one in prefills:
        current = one.speed.is_known and one.speed.rested_s < STALE_S
        speed = one.speed if current else typical
        waiting_s, uncached = speed.compute_s(one.waiting_tokens), wanted.uncached(one.engine)
        computed_s = waiting_s + speed.compute_s(uncached)
        times[one.engine] = computed_s, NO_FETCH
        lacking = most.tokens - wanted.cached.get(one.engine, 0)
        if one.fetches and lacking > 0:
            fetch_s = FETCH_S + lacking * (one.speed.fetched_token_s or speed.token_s / FETCH_SPEEDUP)
            fetched_s = max(waiting_s, fetch_s) + speed.compute_s(max(uncached - lacking, 1))
            if fetched_s < computed_s - TIE_S:
                times[one.engine] = fetched_s, most
    return times


def has_room(decode: EngineView, wanted: Wanted) -> bool:
    """Whether a decode engine has a slot and KV room, by what it last said: it will hardly refuse."""
    return decode.load < decode.slots and wanted.tokens <= decode.free_tokens - decode.placed_tokens


def lateness(prefill: EngineView, ttft_s: float, limit_s: float) -> float:
    """By how many seconds a first token that is predicted to take `ttft_s` comes after `limit_s`.

    0 for an engine that is new, or that has nothing to do: what it was seen to take may be long ago.
    """
    if not prefill.speed.is_known or not prefill.waiting_tokens:
        return 0.0
    return max(ttft_s - limit_s, 0.0)


def predicted_answer_times(decodes: Sequence[EngineView], wanted: Wanted) -> dict[str, float]:
    """Seconds that an answer of ANSWER_TOKENS takes on each decode engine.

    A step grows with its rows, from what it took lately. What finds no slot or no KV room waits for about one answer
    more. One more is counted, too, where steps would be longer than `wanted.tpot_s`: such an engine comes last.
    """
    known = [one.speed.step_s / (one.load - one.placed + IDLE_ROWS) for one in decodes if one.speed.step_s]
    row_s = statistics.median(known) if known else 1e-6
    times = {}
    for one in decodes:
        own_s = one.speed.step_s / (one.load - one.placed + IDLE_ROWS) if one.speed.step_s else row_s
        step_s = own_s * (one.load + 1 + IDLE_ROWS)
        waits = max(one.load + 1 - one.slots, 0) / one.slots if one.slots else 0.0
        waits += wanted.uncached(one.engine) > one.free_tokens - one.placed_tokens
        waits += step_s > wanted.tpot_s
        times[one.engine] = ANSWER_TOKENS * step_s * (1 + waits)
    return times


def _decode_costs(policy: Policy, decodes: Sequence[EngineView], wanted: Wanted) -> dict[str, tuple[float, ...]]:
    match policy:
        case "kv_aware":
            times = predicted_answer_times(decodes, wanted)
            if decodes[0].role == "colocated":
                ttfts = predicted_ttfts(decodes, wanted)
                times = {name: time + ttfts[name][0] for name, time in times.items()}
            return {name: (time // TIE_S,) for name, time in times.items()}
        case "least_load":
            return {one.engine: (one.load,) for one in decodes}
        case "round_robin":
            return dict.fromkeys((one.engine for one in decodes), ())


def _prefill_costs(
    policy: Policy, prefills: Sequence[EngineView], wanted: Wanted, near: Collection[str]
) -> dict[str, tuple[float, ...]]:
    match policy:
        case "kv_aware":
            ttfts = predicted_ttfts(prefills, wanted)
            times = {name: (ttft + NEW_LINK_S * (name not in near)) // TIE_S for name, (ttft, _) in ttfts.items()}
            return {name: (time, wanted.uncached(name)) for name, time in times.items()}
        case "least_load":
            return {one.engine: (one.load + 0.5 * (one.engine not in near),) for one in prefills}
        case "round_robin":
            return dict.fromkeys((one.engine for one in prefills), ())


def _cheapest(engines: Sequence[EngineView], costs: Mapping[str, tuple[float, ...]], counter: int) -> EngineView:
    least = min(costs.values())
    equal = [engine for engine in engines if costs[engine.engine] == least]
    return equal[counter % len(equal)]
