"""The router's connections to engines: who is there, how each one does, and what it says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from splitserve.cluster.channel import CurveKeys, RouterChannel
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import (
    Busy,
    Cancel,
    EngineSpeed,
    EngineStats,
    Failed,
    FirstToken,
    Heartbeat,
    Member,
    Prefill,
    PrefixUpdate,
    Reserve,
)
from splitserve.router.policy import EngineView
from splitserve.router.prefix_index import PrefixIndex

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0


class LoadChange:
    """What an engine has been given and has done with since its last stats, as far as its router knows.

    Stats come twice a second, in which an engine may have begun and ended many prompts. Both counts may be negative.
    """

    def __init__(self) -> None:
        self.requests = self.tokens = 0
        self.lacking: dict[tuple[str, int], int] = {}  # tokens that an attempt's engine does not have yet

    def placed(self, attempt: tuple[str, int], tokens: int) -> None:
        """The engine lacks so many tokens of this attempt, which may be new to it."""
        self.requests += attempt not in self.lacking
        self.tokens += tokens - self.lacking.get(attempt, 0)
        self.lacking[attempt] = tokens

    def computed(self, attempt: tuple[str, int]) -> None:
        """The engine lacks nothing of this attempt any more, but goes on with it."""
        if attempt in self.lacking:
            self.placed(attempt, 0)

    def over(self, attempt: tuple[str, int]) -> None:
        """The engine has done with this attempt, if it had it."""
        if (tokens := self.lacking.pop(attempt, None)) is not None:
            self.requests -= 1
            self.tokens -= tokens

    def heard(self) -> None:
        """Stats have come that say all of it."""
        self.requests = self.tokens = 0


class Engine:
    """One connected engine. It is `ready` while it answers heartbeats, as the incarnation that membership named."""

    channel: RouterChannel
    watch: asyncio.Task[None]

    def __init__(self, member: Member) -> None:
        self.member = member
        self.stats: EngineStats | None = None
        self.last_seen = time.monotonic()
        self.ready = False
        self.change = LoadChange()

    @property
    def is_open(self) -> bool:
        """Whether it can take requests."""
        return self.ready and not self.member.draining

    @property
    def view(self) -> EngineView:
        """What placement needs to know of it."""
        stats, change = self.stats, self.change
        return EngineView(
            engine=self.member.engine,
            role=self.member.role,
            load=max(change.requests + (stats.running + stats.waiting if stats else 0), 0),
            placed=change.requests,
            placed_tokens=change.tokens,
            free_tokens=stats.free_tokens if stats else 0,
            slots=stats.slots if stats else 0,
            fetches=bool(stats and stats.role == "prefill" and stats.staging.total),
            speed=stats.speed if stats else EngineSpeed(),
        )

    def close(self) -> None:
        self.watch.cancel()
        self.channel.close()


class Engines:
    """All engines of the cluster, kept equal to a membership list.

    `on_message(engine, message)` gets all that engines say about requests; `on_lost(engine, reason)` is called when one
    leaves, restarts or falls silent for `timeout_s` seconds.
    """

    def __init__(
        self,
        identity: str,
        keys: CurveKeys | None,
        timeout_s: float,
        on_message: Callable[[str, Any], None],
        on_lost: Callable[[str, str], None],
    ) -> None:
        self._identity = identity
        self._keys = keys
        self._timeout_s = timeout_s
        self._on_message = on_message
        self._on_lost = on_lost
        self.prefixes = PrefixIndex()
        self._engines: dict[str, Engine] = {}

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines.values())

    def set_members(self, members: Sequence[Member]) -> None:
        """Connect to new engines and drop those that are gone. Only a drain changes an engine: else it is a new one."""
        wanted = {member.engine: member for member in members}
        for name, engine in list(self._engines.items()):
            member = wanted.get(name)
            if member is not None and replace(member, draining=engine.member.draining) == engine.member:
                engine.member = member
            else:
                del self._engines[name]
                engine.close()
                self.prefixes.remove(name)
                self._on_lost(name, "restarted" if name in wanted else "left the cluster")
        for name, member in wanted.items():
            if name not in self._engines:
                self._engines[name] = self._connect(member)

    def layout(self, name: str) -> KvLayout:
        """The KV layout of engine `name`, which must be a member."""
        return self._engines[name].member.layout

    def views(self, *roles: str) -> list[EngineView]:
        """The engines of these roles that can take requests, by name."""
        engines = [engine for _, engine in sorted(self._engines.items()) if engine.is_open]
        return [engine.view for engine in engines if engine.member.role in roles]

    def cached_tokens(self, token_ids: Sequence[int], extra_keys: tuple[str, ...]) -> Mapping[str, int]:
        """How many leading tokens each engine has cached, of those that can take requests and have any."""
        cached = self.prefixes.cached_tokens(token_ids, extra_keys)
        return {name: tokens for name, tokens in cached.items() if self._engines[name].is_open}

    def place(self, name: str, message: Reserve | Prefill, tokens: int) -> None:
        """Send a request to engine `name`, which lacks `tokens` of it: they count in its load at once."""
        if (engine := self._engines.get(name)) is not None:
            engine.change.placed((message.request_id, message.attempt), tokens)
            self.send(name, message)

    def send(self, name: str, message: object) -> None:
        """Send without waiting; to an engine that is gone, nothing."""
        if (engine := self._engines.get(name)) is not None:
            if type(message) is Cancel and message.sample is None:
                engine.change.over((message.request_id, message.attempt))
            engine.channel.send(message)

    def over(self, name: str, request_id: str, attempt: int) -> None:
        """Engine `name` has ended an attempt by itself."""
        if (engine := self._engines.get(name)) is not None:
            engine.change.over((request_id, attempt))

    def close(self) -> None:
        """Disconnect."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def _connect(self, member: Member) -> Engine:
        self.prefixes.add(member.engine, member.layout.page_size)
        engine = Engine(member)
        take = partial(self._take, engine)
        engine.channel = RouterChannel(member.address, self._identity.encode(), take, self._keys)
        engine.watch = asyncio.ensure_future(self._watch(engine))
        return engine

    def _take(self, engine: Engine, message: Any) -> None:
        if type(message) is EngineStats:
            self._heard(engine, message)
        elif type(message) is PrefixUpdate:
            self._learn(engine, message)
        else:
            if isinstance(message, FirstToken | Busy | Failed):
                self._count(engine, message)
            self._on_message(engine.member.engine, message)

    def _count(self, engine: Engine, message: FirstToken | Busy | Failed) -> None:
        attempt = message.request_id, message.attempt
        if isinstance(message, FirstToken) and engine.member.role == "colocated":
            engine.change.computed(attempt)
        else:
            engine.change.over(attempt)

    async def _watch(self, engine: Engine) -> None:
        """Send heartbeats, and notice silence."""
        while True:
            version = self.prefixes.version(engine.member.engine)
            engine.channel.send(Heartbeat(self._identity, version))
            await asyncio.sleep(min(HEARTBEAT_S, self._timeout_s / 6))
            silent_s = time.monotonic() - engine.last_seen
            if engine.ready and silent_s > self._timeout_s:
                self._lose(engine, f"silent for {silent_s:.1f} s")

    def _heard(self, engine: Engine, stats: EngineStats) -> None:
        if stats.incarnation != engine.member.incarnation:
            if engine.ready:
                self._lose(engine, "restarted")
            return
        engine.stats = stats
        engine.change.heard()
        engine.last_seen = time.monotonic()
        engine.ready = True

    def _learn(self, engine: Engine, news: PrefixUpdate) -> None:
        if (news.engine, news.incarnation) == (engine.member.engine, engine.member.incarnation):
            self.prefixes.update(news)

    def _lose(self, engine: Engine, reason: str) -> None:
        engine.ready = False
        log.warning("engine lost", extra={"engine": engine.member.engine, "reason": reason})
        self._on_lost(engine.member.engine, reason)
