"""The conductor of a chaos run: places requests, kills and stops ranks, and counts how each request ends."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from splitserve.cluster.channel import wait
from splitserve.cluster.messages import Ticket
from tests.kv_transfer.chaos.member import Member, start_member
from tests.kv_transfer.chaos.rank import FRAMES
from tests.kv_transfer.chaos.report import Fault, Report
from tests.kv_transfer.chaos.setup import Setup

STEP_MS, RETRY_S, ASK_S = 5, 0.05, 0.25
READY_S = END_S = FAULT_S = 60.0
HEAL_S = 90.0  # a link to a rank that is gone is given up after 20 s, and made anew after up to 30 s
HEALED = 5  # transfers of a pair


@dataclass
class Request:
    number: int
    began: float
    attempts: int = 0
    retry_at: float | None = 0.0  # None while an attempt is under way


@dataclass
class Attempt:
    """It ends by its target's word, or with its target."""

    request: Request
    target: Member
    source: Member | None = None


class Conductor:
    """Keeps `requests` under way until `faults` are through and every pair has healed."""

    def __init__(self, setup: Setup, faults: deque[Fault], requests: int, seed: int) -> None:
        self._setup, self._faults, self._under_way = setup, faults, requests
        self._random = random.Random(seed)
        self._requests: dict[int, Request] = {}
        self._attempts: dict[str, Attempt] = {}
        self._pairs: Counter[tuple[Member, Member]] = Counter()  # transfers since the last fault
        self._accepting, self._placed, self._ask_at, self._began = False, 0, 0.0, 0.0
        self.report = Report()
        places = [(side, number) for side, devices in setup.devices.items() for number in range(len(devices))]
        self._members = {place: start_member(setup, *place) for place in places}

    def run(self) -> Report:
        self._until("all ranks are up", lambda: all(member.is_well for member in self._all), READY_S)
        self._accepting, self._began = True, time.monotonic()
        self._until("all faults are through", lambda: not self._faults, self._faults[-1].at_s + FAULT_S)
        self._until("every pair has healed", self._has_healed, HEAL_S)
        self._accepting = False
        self._until("every request has ended", lambda: not self._requests, END_S)
        empty = "nothing is left of transfers"
        self._until(empty, lambda: all(member.state and not member.state.left for member in self._all), END_S)
        self.report.members = self._all
        for member in self._all:
            self.report.note_longest_pass(member)
            member.tell("stop")
        for member in self._all:
            member.process.join(20)
            assert member.process.exitcode == 0, f"{member.side} {member.number}: {member.process.exitcode}"
        return self.report

    def close(self) -> None:
        for member in self._all:
            member.process.kill()
            member.process.join()
            member.socket.close(linger=0)

    @property
    def _all(self) -> list[Member]:
        return list(self._members.values())

    def _ready(self, side: str) -> list[Member]:
        return [member for member in self._all if member.side == side and member.address is not None]

    def _until(self, what: str, there: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for member in self._all:
            member.state = None
        while not there():
            states = [(member.side, member.number, member.state) for member in self._all]
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}; {list(self._attempts)}, {states}"
            wait([member.socket for member in self._all], STEP_MS)
            for member in self._all:
                while member.socket.poll(0):
                    self._hear(member, *member.socket.recv_pyobj())
                if member.process.exitcode is not None:
                    self._bury(member)
                elif member.resume_at is not None and time.monotonic() >= member.resume_at:
                    member.resume()
            self._strike()
            self._place()
            self._ask()

    def _hear(self, member: Member, kind: str, about: Any, detail: Any = None) -> None:
        match kind:
            case "ready":
                member.address = about
            case "state":
                member.state = about
            case "busy":
                self.report.busy += 1
                self._attempts.pop(about).request.retry_at = time.monotonic() + RETRY_S
            case "granted":
                self._begin(about, detail)
            case "sent":
                self.report.sent[detail] += 1
            case "stopped":
                self.report.note_failure("sender", detail)
            case "verified":
                self._end(about)
            case "failed":
                self.report.note_failure("receiver", detail)
                self._try_again(about)

    def _place(self) -> None:
        while self._accepting and len(self._requests) < self._under_way:
            self._requests[self._placed] = Request(self._placed, time.monotonic())
            self._placed += 1
        now, targets = time.monotonic(), self._ready("target")
        loads = Counter(attempt.target for attempt in self._attempts.values())
        for request in self._requests.values():
            if targets and request.retry_at is not None and now >= request.retry_at:
                target = min(targets, key=lambda member: (loads[member], self._random.random()))
                loads[target] += 1
                transfer_id, request.retry_at = f"{request.number}/{request.attempts}", None
                self._attempts[transfer_id] = Attempt(request, target)
                target.tell("open", transfer_id)

    def _begin(self, transfer_id: str, ticket: Ticket) -> None:
        attempt, sources = self._attempts[transfer_id], self._ready("source")
        attempt.request.attempts += 1
        self.report.attempts += 1
        if not sources:
            attempt.target.tell("abort", transfer_id, "there is no source")
            return
        loads = Counter(other.source for other in self._attempts.values())
        attempt.source = min(sources, key=lambda member: (loads[member], self._random.random()))
        attempt.source.tell("begin", ticket)

    def _end(self, transfer_id: str) -> None:
        attempt = self._attempts.pop(transfer_id, None)
        assert attempt is not None, f"{transfer_id} has ended before"
        assert attempt.source is not None
        self._pairs[attempt.source, attempt.target] += 1
        self.report.seconds.append(time.monotonic() - attempt.request.began)
        del self._requests[attempt.request.number]

    def _try_again(self, transfer_id: str) -> None:
        attempt = self._attempts.pop(transfer_id, None)
        assert attempt is not None, f"{transfer_id} has ended before"
        attempt.request.retry_at = time.monotonic()

    def _strike(self) -> None:
        """The next fault, once it is due and its rank has transfers and frames under way."""
        if not self._faults or not self._accepting or time.monotonic() < self._began + self._faults[0].at_s:
            return
        fault = self._faults[0]
        member = self._members[fault.side, fault.number]
        disturbed = sum(member in (attempt.source, attempt.target) for attempt in self._attempts.values())
        if not disturbed or not member.gauges[FRAMES] or (fault.stop_s is not None and not member.is_well):
            return
        self._faults.popleft()
        self._pairs.clear()
        self.report.disturbed.append(disturbed)
        if fault.stop_s is None:
            member.kill()
        else:
            member.stop(fault.stop_s)
        self.report.faults[f"{'SIGKILL' if member.killed else 'SIGSTOP'} {fault.side}"] += 1
        for target in self._ready("target"):
            target.tell("check")

    def _bury(self, member: Member) -> None:
        """Another rank in its place. Of those that had to do with it, half hear of it and half must find out."""
        assert member.killed, f"{member.side} {member.number} died by itself: {member.process.exitcode}"
        self.report.killed_mid_copy[member.side] += member.gauges[FRAMES] > 0
        self.report.note_longest_pass(member)
        member.socket.close(linger=0)
        for transfer_id, attempt in list(self._attempts.items()):
            other = attempt.source if member is attempt.target else attempt.target
            if member in (attempt.source, attempt.target) and other is not None and self._random.random() < 0.5:
                other.tell("abort", transfer_id, "the other rank is gone")
            if member is attempt.target:
                self._try_again(transfer_id)
        for other in self._all:
            other.lost_peers += other.side != member.side
        self._members[member.side, member.number] = start_member(self._setup, member.side, member.number)

    def _has_healed(self) -> bool:
        """Whether KV has gone between all pairs since all ranks are back, and through a link where they have those."""
        if not all(member.is_well for member in self._all):
            self._pairs.clear()
            return False
        sources, targets = self._ready("source"), self._ready("target")
        if not all(self._pairs[source, target] >= HEALED for source in sources for target in targets):
            return False
        if self._setup.transport != "nccl":
            return True
        links = [
            source.state.links.get(target.address or "") for source in sources if source.state for target in targets
        ]
        return len(links) == len(sources) * len(targets) and all(link and link[0] == "up" and link[1] for link in links)

    def _ask(self) -> None:
        if time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + ASK_S
            for member in self._ready("source") + self._ready("target"):
                member.tell("state")
