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
    Bury,
    Deaths,
    Start,
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


@pytest.mark.parametrize("seed", range(200))
def test_random_deaths_always_heal(seed: int) -> None:
    """Carrying out the actions leads to a settled cluster with every unit running and routers that know all engines."""
    random_ = random.Random(seed)
    engines = [f"decode/{index}/0" for index in range(random_.randint(1, 4))]
    routers = [f"router/{index}" for index in range(random_.randint(1, 2))]
    views = dict.fromkeys([*engines, *routers], ABSENT)
    now = 0.0
    for step in range(300):
        now += 1.0
        if step < 60 and random_.random() < 0.3:
            name = random_.choice([*engines, *routers])
            views[name] = replace(views[name], death="killed" if views[name].running else None)
        for action in reconcile(views, now):
            views[action.unit] = carry_out(action, views[action.unit], now, engines)
    told = tuple(member(name, views[name].member.incarnation) for name in engines if views[name].member)  # type: ignore[union-attr]
    assert all(view.running and view.death is None for view in views.values())
    assert len(told) == len(engines)
    assert all(views[router].told == told for router in routers)
    assert reconcile(views, now) == []


def carry_out(action: Bury | Tell | Start, view: UnitView, now: float, engines: list[str]) -> UnitView:
    match action:
        case Bury(_, reason):
            assert view.running
            return UnitView(deaths=view.deaths.after(reason, started_at=now - 1, now=now))
        case Tell(_, members):
            assert view.running
            assert view.death is None
            return replace(view, told=members)
        case Start(name):
            assert not view.running
            if name in engines:
                return UnitView(running=True, member=member(name, str(now)), deaths=view.deaths)
            return UnitView(running=True, told=(), deaths=view.deaths)
