"""One rank's process body: join the engine's group, load the weights, then lead the engine or follow its leader."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

import torch

from splitserve.cluster.channel import WorkerChannel, wait
from splitserve.cluster.codec import message
from splitserve.cluster.errors import StartupError
from splitserve.cluster.messages import Member, RankEndpoint
from splitserve.cluster.rank_spec import RankSpec
from splitserve.deploy.assembly import Leader, RankParts, build_engine, rank_parts
from splitserve.deploy.loading import LoadedRank, load_rank
from splitserve.engine.group import FollowerLink, GlooGroup, LeaderLink, NcclGroup, host_store, join_store
from splitserve.engine.ranks import Rank, Ranks
from splitserve.engine.serving import IDLE_WAIT_MS, serve
from splitserve.models.layers import SingleRank, TensorParallel

log = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 300.0
COLLECTIVE_TIMEOUT_S = 60.0
LOAD_POLL_S = 0.01


@message
@dataclass(frozen=True)
class JoinGroup:
    """The leader's first command: where the collectives meet."""

    store: str


@message
@dataclass(frozen=True)
class RankReady:
    """A follower's first report."""

    endpoint: RankEndpoint | None


class Worker:
    """One rank. Construction binds its sockets (StartupError if that fails); `run` does the rest."""

    def __init__(self, spec: RankSpec) -> None:
        self._spec = spec
        self.progress = (0, 0)
        self._member: Member | None = None
        self._channel: WorkerChannel | None = None
        self._leader_link: LeaderLink | None = None
        self._follower_link: FollowerLink | None = None
        if not spec.is_leader:
            self._follower_link = FollowerLink(spec.group_address, spec.tp_rank, spec.keys)
            return
        self._channel = WorkerChannel(spec.bind, spec.keys)
        if spec.tp > 1:
            self._leader_link = LeaderLink(spec.tp - 1, spec.bind, spec.keys)

    @property
    def group_address(self) -> str:
        return self._leader_link.address if self._leader_link else ""

    def member(self) -> Member | None:
        return self._member

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set. Raises SplitserveError when the rank cannot start or its group is gone."""
        try:
            if self._spec.device != "cpu":
                torch.cuda.set_device(self._spec.device)
            group = self._join_group()
            loaded = load_rank(self._spec, group, self._note_progress)
            parts = rank_parts(self._spec, loaded)
            try:
                self._serve(loaded, parts, stop)
            finally:
                parts.close()
        finally:
            for end in (self._channel, self._leader_link, self._follower_link):
                if end is not None:
                    end.close()

    def _join_group(self) -> TensorParallel:
        if self._leader_link is not None:
            self._leader_link.wait_for_followers(JOIN_TIMEOUT_S)
            store, address = host_store(self._spec.bind, JOIN_TIMEOUT_S)
            self._leader_link.send(JoinGroup(address))
        elif self._follower_link is not None:
            command = self._follower_link.receive(JOIN_TIMEOUT_S)
            if not isinstance(command, JoinGroup):
                raise StartupError(f"the engine's leader did not answer within {JOIN_TIMEOUT_S:g} s")
            store = join_store(command.store, JOIN_TIMEOUT_S)
        else:
            return SingleRank()
        spec = self._spec
        if spec.device == "cpu":
            return GlooGroup(store, spec.tp_rank, spec.tp, spec.bind, COLLECTIVE_TIMEOUT_S)
        return NcclGroup(store, spec.tp_rank, spec.tp, COLLECTIVE_TIMEOUT_S)

    def _note_progress(self, done: int, total: int) -> None:
        self.progress = (done, total)

    def _serve(self, loaded: LoadedRank, parts: RankParts, stop: threading.Event) -> None:
        rank = Rank(loaded.runner, *parts.services)
        if self._follower_link is not None:
            self._follower_link.report(RankReady(parts.endpoint))
            follow(rank, self._follower_link, stop)
        elif self._channel is not None:
            ranks = Ranks(rank, self._leader_link)
            endpoints = [parts.endpoint, *self._await_followers(ranks)]
            self._lead(self._channel, loaded, ranks, [one for one in endpoints if one is not None], stop)

    def _await_followers(self, ranks: Ranks) -> list[RankEndpoint | None]:
        ready: dict[int, RankEndpoint | None] = {}
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while len(ready) < ranks.size - 1:
            ready |= {rank: report.endpoint for rank, report in ranks.poll() if isinstance(report, RankReady)}
            if time.monotonic() > deadline:
                raise StartupError(f"only {len(ready)} of {ranks.size - 1} TP followers loaded in {JOIN_TIMEOUT_S:g} s")
            time.sleep(LOAD_POLL_S)
        return [ready[rank] for rank in sorted(ready)]

    def _lead(
        self,
        channel: WorkerChannel,
        loaded: LoadedRank,
        ranks: Ranks,
        endpoints: list[RankEndpoint],
        stop: threading.Event,
    ) -> None:
        spec = self._spec
        engine = build_engine(Leader(spec, loaded, ranks, endpoints, channel.send))
        layout = loaded.runner.cache.layout
        self._member = Member(spec.engine, spec.incarnation, spec.role, channel.address, layout)
        log.info("%s serves at %s", spec.engine, channel.address)
        serve(engine, channel, stop, spec.topology.kv_transfer.lease_s)


def follow(rank: Rank, link: FollowerLink, stop: threading.Event) -> None:
    """Execute the leader's commands and report to it. Raises ProtocolError when the stream has a gap."""
    while not stop.is_set():
        command = link.receive(0)
        if command is not None:
            rank.execute(command)
        for report in rank.poll():
            link.report(report)
        if command is None and not rank.busy:
            wait([link.socket, *rank.sockets], IDLE_WAIT_MS)
