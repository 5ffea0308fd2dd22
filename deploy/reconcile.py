"""What the supervisor does next, decided from what it sees. Pure: no Ray, no clock.

A *unit* lives and dies together: all ranks of one engine, or one router.

    absent --Start--> starting --its leader is ready--> ready
       ^                 |                                |
       |                 +------- a rank dies ------------+
       |                                v
       +----Bury (its other ranks are killed)----- dead

Routers hear of a death (Tell) before the engine starts again. A unit that keeps dying soon after its start waits
longer before each try; after CRASH_LOOP quick deaths it counts as failed, and is still tried once a minute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from splitserve.cluster.messages import Member

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
    """One unit as the supervisor sees it.

    `running`: it has processes. `death`: why a process of it is gone (None: all live). `member`: what routers are
    told of a ready engine. `told`: the membership that a ready router was last sent; None for all other units.
    """

    running: bool = False
    death: str | None = None
    member: Member | None = None
    told: tuple[Member, ...] | None = None
    deaths: Deaths = Deaths()


@dataclass(frozen=True)
class Bury:
    unit: str
    reason: str


@dataclass(frozen=True)
class Tell:
    unit: str
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Start:
    unit: str


Action = Bury | Tell | Start


def reconcile(observed: Mapping[str, UnitView], now: float) -> list[Action]:
    """The actions, in order, that lead towards every unit in `observed` running. `now` is the clock of Deaths."""
    dead = {name: view.death for name, view in observed.items() if view.running and view.death is not None}
    membership = members(observed.values())
    return [
        *(Bury(name, reason) for name, reason in dead.items()),
        *(
            Tell(name, membership)
            for name, view in observed.items()
            if name not in dead and view.told is not None and view.told != membership
        ),
        *(Start(name) for name, view in observed.items() if not view.running and now >= view.deaths.retry_at),
    ]


def members(views: Iterable[UnitView]) -> tuple[Member, ...]:
    """What routers should know: every ready engine, in order of its name."""
    ready = [view.member for view in views if view.running and view.death is None and view.member is not None]
    return tuple(sorted(ready, key=lambda member: member.engine))
