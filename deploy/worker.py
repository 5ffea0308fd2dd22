"""One rank's process body: join the engine's group, load the weights, then lead the engine or follow its leader.

Weights and group outlive a switch to another role; pages, sockets and engine are made anew for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from splitserve.cluster.channel import WorkerChannel, wait
from splitserve.cluster.codec import message
from splitserve.cluster.errors import StartupError
from splitserve.cluster.messages import Member, RankEndpoint
from splitserve.cluster.rank_spec import RankSpec, Role
from splitserve.cluster.topology import Topology
from splitserve.deploy.assembly import Leader, RankParts, build_engine, rank_parts
from splitserve.deploy.garbage import collect_all, spare_what_is_there
from splitserve.deploy.loading import LoadedModel, LoadedRank, load_weights
from splitserve.engine.group import FollowerLink, GlooGroup, LeaderLink, NcclGroup, host_store, join_store
from splitserve.engine.ranks import Rank, Ranks
from splitserve.engine.serving import IDLE_WAIT_MS, Drain, serve
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
        self.drain = Drain()
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

    def switch(self, topology: Topology, role: Role) -> None:
        """Serve `role` from now on, as `topology` has it; what the engine still holds is dropped. For any thread."""
        spec, self._member = self._spec, None
        self._spec = replace(spec, topology=topology, role=role, home=spec.home or spec.role)

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set. Raises SplitserveError when the rank cannot start or its group is gone."""
        try:
            if self._spec.device != "cpu":
                torch.cuda.set_device(self._spec.device)
            model = load_weights(self._spec, self._join_group(), self._note_progress)
            while not stop.is_set():
                self._serve_role(self._spec, model, stop)
                _give_back_memory(self._spec.device)
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

    def _serve_role(self, spec: RankSpec, model: LoadedModel, stop: threading.Event) -> None:
        """Serve as `spec` says until another one is there, or `stop` is set."""

        def is_over() -> bool:
            return stop.is_set() or self._spec is not spec

        if spec.is_leader and self._channel is None:
            self._channel = WorkerChannel(spec.bind, spec.keys)
        loaded = model.with_pages(spec)
        parts = rank_parts(spec, loaded)
        try:
            self._serve(spec, loaded, parts, is_over)
        finally:
            parts.close()
            self._leave_role()

    def _leave_role(self) -> None:
        """Give back what a role has that the weights do not need."""
        self._member, self.drain = None, Drain()
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _serve(self, spec: RankSpec, loaded: LoadedRank, parts: RankParts, is_over: Callable[[], bool]) -> None:
        rank = Rank(loaded.runner, *parts.services)
        if self._follower_link is not None:
            spare_what_is_there()
            self._follower_link.report(RankReady(parts.endpoint))
            follow(rank, self._follower_link, is_over)
        elif self._channel is not None:
            ranks = Ranks(rank, self._leader_link)
            endpoints = [parts.endpoint, *self._await_followers(ranks)]
            leader = Leader(spec, loaded, ranks, [one for one in endpoints if one is not None], self._channel.send)
            self._lead(self._channel, leader, is_over)

    def _await_followers(self, ranks: Ranks) -> list[RankEndpoint | None]:
        ready: dict[int, RankEndpoint | None] = {}
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while len(ready) < ranks.size - 1:
            ready |= {rank: report.endpoint for rank, report in ranks.poll(RankReady)}
            if time.monotonic() > deadline:
                raise StartupError(f"only {len(ready)} of {ranks.size - 1} TP followers loaded in {JOIN_TIMEOUT_S:g} s")
            time.sleep(LOAD_POLL_S)
        return [ready[rank] for rank in sorted(ready)]

    def _lead(self, channel: WorkerChannel, leader: Leader, is_over: Callable[[], bool]) -> None:
        spec, engine = leader.spec, build_engine(leader)
        spare_what_is_there()
        self._member = Member(spec.engine, spec.incarnation, spec.role, channel.address, leader.layout)
        log.info("%s serves at %s as %s", spec.engine, channel.address, spec.role)
        serve(engine, channel, is_over, spec.topology.kv_transfer.lease_s, self.drain)


def _give_back_memory(device: str) -> None:
    """Of pages and graphs that a role had, so that those of the next one fit."""
    collect_all()
    if device != "cpu":
        torch.cuda.empty_cache()


def follow(rank: Rank, link: FollowerLink, is_over: Callable[[], bool]) -> None:
    """Execute the leader's commands and report to it. Raises ProtocolError when the stream has a gap."""
    while not is_over():
        command = link.receive(0)
        if command is not None:
            rank.execute(command)
        for report in rank.poll():
            link.report(report)
        if command is None and not rank.busy:
            wait([link.socket, *rank.sockets], IDLE_WAIT_MS)
