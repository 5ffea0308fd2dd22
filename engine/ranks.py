"""The ranks of one engine: every rank executes the leader's commands, all in the same order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

from splitserve.cluster.channel import Pollable
from splitserve.cluster.codec import message
from splitserve.cluster.errors import ProtocolError
from splitserve.cluster.layout import KvLayout
from splitserve.engine.batch import Batch
from splitserve.engine.group import LeaderLink
from splitserve.engine.host_pages import HostPages, Pairs
from splitserve.engine.host_tier import HostTier
from splitserve.engine.kv_cache import pages_for_budget
from splitserve.engine.runner import ModelRunner

Handlers = dict[type, Callable[[Any], Any]]


@message
@dataclass(frozen=True)
class RunBatch:
    """Run the model; the result is the logits of the batch's wanted rows."""

    batch: Batch


@message
@dataclass(frozen=True)
class CopyPages:
    pairs: tuple[tuple[int, int], ...]


@message
@dataclass(frozen=True)
class MovePages:
    """Save each (page, place) to the host tier, in order, and then load each (place, page) from there."""

    saves: tuple[tuple[int, int], ...]
    loads: tuple[tuple[int, int], ...]


class RankService(Protocol):
    """Commands that a rank understands beyond running batches."""

    handlers: Handlers

    @property
    def sockets(self) -> list[Pollable]:
        """Those that `poll` reads."""

    @property
    def busy(self) -> bool:
        """Whether a device is at work for this service, which no socket tells of."""

    def poll(self) -> list[object]:
        """Reports for the leader since the last call; also the service's chance to make progress."""


class Rank:
    """What one rank does for its engine."""

    def __init__(self, runner: ModelRunner, *services: RankService) -> None:
        self._services, tier = services, HostTier(runner.cache)
        self._handlers: Handlers = {
            RunBatch: lambda command: runner.run(command.batch),
            CopyPages: lambda command: runner.copy_pages(command.pairs),
            MovePages: lambda command: tier.move(command.saves, command.loads),
        }
        for service in services:
            self._handlers |= service.handlers

    def execute(self, command: object) -> Any:
        handler = self._handlers.get(type(command))
        if handler is None:
            raise ProtocolError(f"this rank has no command {type(command).__name__}")
        return handler(command)

    @property
    def sockets(self) -> list[Pollable]:
        return [socket for service in self._services for socket in service.sockets]

    @property
    def busy(self) -> bool:
        return any(service.busy for service in self._services)

    def poll(self) -> list[object]:
        return [report for service in self._services for report in service.poll()]


class Ranks:
    """The leader's handle on all ranks of its engine, itself included."""

    def __init__(self, local: Rank, link: LeaderLink | None = None) -> None:
        self._local = local
        self._link = link
        self._reports: list[tuple[int, Any]] = []
        self.size = 1 if link is None else link.followers + 1

    def execute(self, command: object) -> Any:
        """Have every rank execute `command`; returns the leader's own result."""
        if self._link is not None:
            self._link.send(command)
        return self._local.execute(command)

    def host_pages(self, layout: KvLayout, budget_bytes: int) -> HostPages:
        """Places of pages in host memory, as many on every rank as a rank's `budget_bytes` hold."""

        def move(saves: Pairs, loads: Pairs) -> None:
            self.execute(MovePages(tuple(saves), tuple(loads)))

        return HostPages(pages_for_budget(layout, budget_bytes), move)

    @property
    def sockets(self) -> list[Pollable]:
        """Those that `poll` reads."""
        return self._local.sockets if self._link is None else [*self._local.sockets, self._link.socket]

    @property
    def busy(self) -> bool:
        """Whether to poll again at once, whatever the sockets say."""
        return self._local.busy

    def poll(self, *kinds: type) -> list[tuple[int, Any]]:
        """Reports of these `kinds` as (rank, report). Others wait for who asks for them."""
        self._reports += [(0, report) for report in self._local.poll()]
        if self._link is not None:
            self._reports += self._link.reports()
        reports = self._reports
        self._reports = [(rank, report) for rank, report in reports if not isinstance(report, kinds)]
        return [(rank, report) for rank, report in reports if isinstance(report, kinds)]


class Agreement:
    """Collects one report a rank for each key; `agreed` once the last one came."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._reported: defaultdict[Hashable, set[int]] = defaultdict(set)

    def add(self, key: Hashable, rank: int) -> bool:
        reported = self._reported[key]
        reported.add(rank)
        if len(reported) < self._ranks:
            return False
        del self._reported[key]
        return True

    def forget(self, key: Hashable) -> None:
        self._reported.pop(key, None)
