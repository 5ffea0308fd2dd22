from __future__ import annotations

import random
from dataclasses import replace

import pytest

from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import Member
from splitserve.deploy.reconcile import (
    CRASH_LOOP,
    QUICK_S,
    RETRY_S,
    SLOW_RETRY_S,
    Action,
    Bury,
    Deaths,
    Drain,
    Remove,
    Start,
    Stop,
    Switch,
    Tell,
    UnitView,
    reconcile,
)

LAYOUT = KvLayout(tp=1, num_layers=1, planes=2, num_kv_heads=1, head_dim=1, page_size=16, dtype="float32")
ABSENT = UnitView()
STARTING = UnitView(running=True)


def member(engine: str, incarnation: str = "a") -> Member:
    return Member(engine, incarnation, "decode", "tcp://127.0.0.1:1", LAYOUT)


def ready(engine: str) -> UnitView:
    return UnitView(running=True, member=member(engine))


def test_everything_absent_is_started() -> None:
    assert reconcile({"decode/0/0": ABSENT, "router/0": ABSENT}, 0.0) == [Start("decode/0/0"), Start("router/0")]


def test_those_that_few_nodes_may_have_start_first() -> None:
    tied = replace(ABSENT, tied=True)
    assert reconcile({"decode/0/0": ABSENT, "router/0": tied}, 0.0) == [Start("router/0"), Start("decode/0/0")]


def test_a_settled_cluster_is_left_alone() -> None:
    engine = ready("decode/0/0")
    router = UnitView(running=True, told=(member("decode/0/0"),))
    assert reconcile({"decode/0/0": engine, "router/0": router, "prefill/0/0": STARTING}, 100.0) == []


def test_routers_hear_of_a_new_engine_in_order_of_names() -> None:
    views = {"decode/1/0": ready("decode/1/0"), "decode/0/0": ready("decode/0/0"), "router/0": ready("x")}
    views["router/0"] = UnitView(running=True, told=())
    assert reconcile(views, 0.0) == [Tell("router/0", (member("decode/0/0"), member("decode/1/0")))]


def test_a_router_that_does_not_listen_yet_is_told_nothing() -> None:
    assert reconcile({"decode/0/0": ready("decode/0/0"), "router/0": STARTING}, 0.0) == []


def test_a_death_is_told_before_the_next_start() -> None:
    dead = replace(ready("decode/0/0"), death="decode/0/0: killed")
    router = UnitView(running=True, told=(member("decode/0/0"),))
    observed = {"decode/0/0": dead, "router/0": router}
    assert reconcile(observed, 0.0) == [Bury("decode/0/0", "decode/0/0: killed"), Tell("router/0", ())]


def test_a_dead_router_is_not_told() -> None:
    router = UnitView(running=True, death="killed", told=())
    assert reconcile({"decode/0/0": ready("decode/0/0"), "router/0": router}, 0.0) == [Bury("router/0", "killed")]


def test_the_first_restart_is_immediate_and_later_ones_back_off() -> None:
    deaths, now, waits = Deaths(), 1000.0, []
    for _ in range(CRASH_LOOP):
        deaths = deaths.after("bad weights", started_at=now, now=now)
        waits.append(deaths.retry_at - now)
        view = UnitView(deaths=deaths)
        assert reconcile({"decode/0/0": view}, deaths.retry_at) == [Start("decode/0/0")]
        if waits[-1]:
            assert reconcile({"decode/0/0": view}, deaths.retry_at - 0.01) == []
    assert waits == [*RETRY_S, SLOW_RETRY_S]
    assert waits[0] == 0
    assert deaths.is_crash_loop
    assert deaths.total == CRASH_LOOP


def test_a_long_life_is_forgiven() -> None:
    deaths = Deaths()
    for _ in range(CRASH_LOOP):
        deaths = deaths.after("killed", started_at=0.0, now=QUICK_S * 2)
    assert not deaths.is_crash_loop
    assert deaths.retry_at == QUICK_S * 2
    assert deaths.total == CRASH_LOOP


def test_a_drain_is_told_to_routers_before_the_engine() -> None:
    unwanted = replace(ready("decode/0/0"), wanted=False)
    router = UnitView(running=True, told=(member("decode/0/0"),))
    marked = replace(member("decode/0/0"), draining=True)
    observed = {"decode/0/0": unwanted, "router/0": router}
    assert reconcile(observed, 0.0) == [Tell("router/0", (marked,)), Drain("decode/0/0", True)]
    told = {"decode/0/0": replace(unwanted, draining=True), "router/0": replace(router, told=(marked,))}
    assert reconcile(told, 0.0) == []
    spent = {**told, "decode/0/0": replace(unwanted, draining=True, spent=True)}
    assert reconcile(spent, 0.0) == [Stop("decode/0/0")]
    stopping = {**told, "decode/0/0": replace(unwanted, draining=True, spent=True, stopping=True)}
    assert reconcile(stopping, 0.0) == [Tell("router/0", ())]
    gone = {"decode/0/0": UnitView(wanted=False), "router/0": replace(router, told=())}
    assert reconcile(gone, 0.0) == []


def test_a_drain_that_is_called_off() -> None:
    draining = replace(ready("decode/0/0"), draining=True)
    assert reconcile({"decode/0/0": draining}, 0.0) == [Drain("decode/0/0", False)]


def test_a_router_that_drains_ends_and_starts_anew() -> None:
    draining = UnitView(running=True, told=(), draining=True)
    assert reconcile({"router/0": draining}, 0.0) == []
    assert reconcile({"router/0": replace(draining, spent=True)}, 0.0) == [Stop("router/0")]


def test_one_that_dies_while_it_drains_does_not_come_back() -> None:
    dying = replace(ready("decode/0/0"), wanted=False, draining=True, death="killed")
    assert reconcile({"decode/0/0": dying}, 0.0) == [Bury("decode/0/0", "killed")]
    assert reconcile({"decode/0/0": UnitView(wanted=False)}, 1e9) == []


def test_an_adopted_unit_that_must_leave_is_heard_first() -> None:
    adopted = UnitView(running=True, draining=None, wanted=False)
    assert reconcile({"decode/0/0": adopted}, 0.0) == []
    heard = replace(adopted, member=member("decode/0/0"))
    assert reconcile({"decode/0/0": heard}, 0.0) == [Drain("decode/0/0", True)]


def test_routers_are_told_nothing_while_an_adopted_engine_is_unheard() -> None:
    """They know it, and would take its requests elsewhere."""
    adopted = UnitView(running=True, draining=None)
    router = UnitView(running=True, told=(member("decode/0/0"), member("decode/1/0")))
    observed = {"decode/0/0": ready("decode/0/0"), "decode/1/0": adopted, "router/0": router}
    assert reconcile(observed, 0.0) == []
    assert reconcile({**observed, "decode/1/0": STARTING}, 0.0) == [Tell("router/0", (member("decode/0/0"),))]


def test_a_roll_waits_until_all_others_are_ready() -> None:
    old = {name: replace(ready(name), outdated=True) for name in ("decode/0/0", "decode/1/0")}
    assert reconcile(old, 0.0) == [Drain("decode/0/0", True)]
    assert reconcile({**old, "prefill/0/0": STARTING}, 0.0) == []
    one_leaves = {**old, "decode/0/0": replace(old["decode/0/0"], draining=True)}
    assert reconcile(one_leaves, 0.0) == []


def test_an_old_one_that_is_not_ready_is_replaced_at_once() -> None:
    loading = replace(STARTING, outdated=True)
    old = replace(ready("decode/1/0"), outdated=True)
    assert reconcile({"decode/0/0": loading, "decode/1/0": old}, 0.0) == [Stop("decode/0/0")]


def test_a_switch_keeps_the_process() -> None:
    view = replace(ready("decode/0/0"), new_role="prefill")
    assert reconcile({"decode/0/0": view}, 0.0) == [Drain("decode/0/0", True)]
    spent = replace(view, draining=True, spent=True)
    assert reconcile({"decode/0/0": spent}, 0.0) == [Switch("decode/0/0", "prefill")]
    assert reconcile({"decode/0/0": replace(spent, wanted=False)}, 0.0) == [Stop("decode/0/0")]


class Simulated:
    """A cluster that carries out what reconcile says, in its own time, while units die and wishes change."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.engines = [f"decode/{index}/0" for index in range(self.random.randint(1, 4))]
        self.routers = [f"router/{index}" for index in range(self.random.randint(1, 2))]
        self.views = dict.fromkeys([*self.engines, *self.routers], ABSENT)
        self.specs = dict.fromkeys(self.views, 0)  # by which each runs
        self.newest = 0

    def step(self, disturbed: bool) -> list[Action]:
        self.now += 1.0
        for name, view in self.views.items():
            self.views[name] = self._live(name, view, disturbed)
        actions = reconcile(self.views, self.now)
        for action in actions:
            self.views[action.unit] = self._carry_out(action, self.views[action.unit])
        return actions

    def _live(self, name: str, view: UnitView, disturbed: bool) -> UnitView:
        chance = self.random.random
        if disturbed and chance() < 0.05:
            self.newest += 1
        if disturbed and chance() < 0.1:
            view = replace(view, wanted=not view.wanted)
        if not disturbed:
            view = replace(view, wanted=True)
        if not view.running:
            return view
        if disturbed and chance() < 0.1:
            return replace(view, death=None if view.stopping else "killed")
        view = replace(view, outdated=self.specs[name] != self.newest)
        if name in self.engines and view.member is None and chance() < 0.5:
            view = replace(view, member=member(name, str(self.now)))
        return replace(view, spent=bool(view.draining) and chance() < 0.5, stopped=view.stopping and chance() < 0.5)

    def _carry_out(self, action: Action, view: UnitView) -> UnitView:
        if not isinstance(action, Start):
            assert view.running
        match action:
            case Bury(_, reason):
                deaths = view.deaths.after(reason, started_at=self.now - 1, now=self.now)
                return UnitView(deaths=deaths, wanted=view.wanted)
            case Tell(_, membership):
                assert view.death is None
                return replace(view, told=membership)
            case Drain(name, wanted):
                assert wanted or name in self.engines
                return replace(view, draining=wanted)
            case Stop():
                assert not view.is_ready or view.spent, "it held requests"
                return replace(view, stopping=True)
            case Remove():
                return UnitView(deaths=view.deaths, wanted=view.wanted)
            case Start(name):
                assert not view.running
                assert view.wanted
                self.specs[name] = self.newest
                return UnitView(running=True, told=() if name in self.routers else None, deaths=view.deaths)
            case Switch():
                raise AssertionError("nobody asked for it")


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_and_is_wanted_it_settles(seed: int) -> None:
    """Every unit runs by the newest spec in the end, and routers know all engines."""
    cluster = Simulated(seed)
    for step in range(600):
        cluster.step(disturbed=step < 60)
    views = cluster.views
    told = tuple(views[name].member for name in cluster.engines)
    assert all(view.is_ready and not view.is_leaving for view in views.values())
    assert set(cluster.specs.values()) == {cluster.newest}
    assert all(views[router].told == told for router in cluster.routers)
    assert cluster.step(disturbed=False) == []


@pytest.mark.parametrize("seed", range(50))
def test_a_roll_takes_one_at_a_time(seed: int) -> None:
    cluster = Simulated(seed)
    while cluster.step(disturbed=False) or not all(view.is_ready for view in cluster.views.values()):
        pass
    cluster.newest += 1
    for _ in range(200):
        cluster.step(disturbed=False)
        assert sum(not view.is_ready or view.is_leaving for view in cluster.views.values()) <= 1
    assert set(cluster.specs.values()) == {1}
