"""What the supervisor does next, decided from what it sees. Pure: no Ray, no clock.

A *unit* lives and dies together: all ranks of one engine, or one router.

    absent --Start--> starting --its leader is ready--> ready <--Drain(off)---+
       ^                 |                                | `--Drain(on)--> draining --Switch--> starting, other role
       |                 +------- a rank dies ------------+                  | Stop
       |                                v                                    v
       +----Bury (its other ranks are killed)----- dead                   stopping --Remove--> absent

Routers hear of a death (Tell) before the engine starts again, and of a drain before it begins; while a new supervisor
does not know yet which of the units that it found are ready, they hear nothing. A unit that keeps dying soon after its
start waits longer before each try; after CRASH_LOOP quick deaths it counts as failed, and is still tried once a minute.

A unit has to leave at once where it is not wanted any more, or is to have another role. Units that run by an old spec
leave one at a time, while all others are ready: that is a rolling restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from splitserve.cluster.messages import Member
from splitserve.cluster.topology_sections import Role

QUICK_S = 60.0
RETRY_S = (0.0, 1.0, 2.0, 4.0)
CRASH_LOOP = len(RETRY_S) + 1
SLOW_RETRY_S = 60.0


@dataclass(frozen=True)
class Deaths:
    """What a unit died of so far. `quick` counts deaths in a row that came within QUICK_S of their start."""

    total: int = 0
    quick: int = 0
    last_at: float = 0.0
    last_reason: str = ""

    def after(self, reason: str, started_at: float, now: float) -> Deaths:
        quick = self.quick + 1 if now - started_at < QUICK_S else 1
        return replace(self, total=self.total + 1, quick=quick, last_at=now, last_reason=reason)

    @property
    def is_crash_loop(self) -> bool:
        return self.quick >= CRASH_LOOP

    @property
    def retry_at(self) -> float:
        """When the next start is due, in seconds of the supervisor's clock."""
        if self.quick == 0:
            return 0.0
        return self.last_at + (SLOW_RETRY_S if self.is_crash_loop else RETRY_S[self.quick - 1])


@dataclass(frozen=True)
class UnitView:
    """One unit as the supervisor sees it, and what is wanted of it.

    `running`: it has processes. `death`: why a process of it is gone (None: all live). `member`: what routers are
    told of a ready engine. `told`: the membership that a ready router knows; None for all other units. `draining`:
    what it was told, None for an adopted unit that has not been heard yet. `spent`: it has drained, or had its time
    to. `stopping` and `stopped`: it was told to end, and has.

    `wanted`: it is to run; `outdated`: not as it does; `new_role`: but for its role. `tied`: few nodes may have it.
    """

    running: bool = False
    death: str | None = None
    member: Member | None = None
    told: tuple[Member, ...] | None = None
    deaths: Deaths = Deaths()
    draining: bool | None = False
    spent: bool = False
    stopping: bool = False
    stopped: bool = False
    wanted: bool = True
    outdated: bool = False
    new_role: Role | None = None
    tied: bool = False

    @property
    def is_ready(self) -> bool:
        return self.running and self.death is None and not self.stopping and bool(self.member or self.told is not None)

    @property
    def is_leaving(self) -> bool:
        """Whether it is on its way out already."""
        return self.stopping or self.draining is True


@dataclass(frozen=True)
class Bury:
    unit: str
    reason: str


@dataclass(frozen=True)
class Tell:
    unit: str
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Drain:
    unit: str
    wanted: bool


@dataclass(frozen=True)
class Switch:
    unit: str
    role: Role


@dataclass(frozen=True)
class Stop:
    unit: str


@dataclass(frozen=True)
class Remove:
    unit: str


@dataclass(frozen=True)
class Start:
    unit: str


Action = Bury | Tell | Drain | Switch | Stop | Remove | Start


def reconcile(observed: Mapping[str, UnitView], now: float) -> list[Action]:
    """The actions, in order, that lead towards every unit in `observed` being as is wanted. `now`: clock of Deaths."""
    living = {name: view for name, view in observed.items() if view.running and view.death is None}
    leaving = _leaving(observed)
    membership = members(observed)
    all_heard = not any(view.draining is None for view in living.values())
    return [
        *(Bury(name, view.death) for name, view in observed.items() if view.running and view.death is not None),
        *(
            Tell(name, membership)
            for name, view in living.items()
            if all_heard and view.told is not None and view.told != membership and not view.stopping
        ),
        *(
            Drain(name, name in leaving)
            for name, view in living.items()
            if view.is_ready and view.draining is not (name in leaving)
        ),
        *(_departure(name, view) for name, view in living.items() if name in leaving and _may_depart(view)),
        *(Remove(name) for name, view in living.items() if view.stopped),
        *(Start(name) for name in _due(observed, now)),
    ]


def _due(observed: Mapping[str, UnitView], now: float) -> list[str]:
    """Units to start, first those that could have no other place if these took it."""
    due = {
        name: view
        for name, view in observed.items()
        if view.wanted and not view.running and now >= view.deaths.retry_at
    }
    return sorted(due, key=lambda name: not due[name].tied)


def members(observed: Mapping[str, UnitView]) -> tuple[Member, ...]:
    """What routers should know: every ready engine, in order of its name, and whether it is to leave."""
    leaving = _leaving(observed)
    ready = {name: view.member for name, view in observed.items() if view.is_ready and view.member is not None}
    marked = [replace(member, draining=name in leaving) for name, member in ready.items()]
    return tuple(sorted(marked, key=lambda member: member.engine))


def _leaving(observed: Mapping[str, UnitView]) -> set[str]:
    """Units that have to leave now."""
    running = {name: view for name, view in observed.items() if view.running}
    leaving = {
        name
        for name, view in running.items()
        if not view.wanted or view.new_role is not None or _must_end(view) or (view.outdated and not view.is_ready)
    }
    outdated = [name for name, view in running.items() if view.outdated and name not in leaving]
    rolling = [name for name in outdated if running[name].is_leaving]
    if not rolling and not leaving and all(view.is_ready for view in observed.values() if view.wanted):
        rolling = outdated[:1]
    return leaving | set(rolling)


def _must_end(view: UnitView) -> bool:
    """Whether it can no longer be taken back: a router closes its ports when it drains."""
    return view.stopping or (view.told is not None and view.draining is True)


def _may_depart(view: UnitView) -> bool:
    """One that is not ready has nothing to end first."""
    if view.stopping or view.draining is None:
        return False
    return view.spent if view.is_ready and view.draining else not view.is_ready


def _departure(name: str, view: UnitView) -> Action:
    if view.new_role is not None and view.wanted and view.is_ready:
        return Switch(name, view.new_role)
    return Stop(name)
