"""What a cluster is to be: every change of it, and those that are refused."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from splitserve.cluster.errors import InvalidRequest, NotFound
from splitserve.cluster.topology import Topology
from splitserve.deploy.desired import Desired
from splitserve.deploy.units import spec_digest


def topology(**fields: Any) -> Topology:
    two = {"prefill": {"replicas": 2}, "decode": {"replicas": 2}}
    return Topology.model_validate({"name": "t", "model": {"path": "m"}, **two, **fields})


def desired(**fields: Any) -> Desired:
    return Desired(topology=topology(**fields))


def digests(state: Desired) -> dict[str, str]:
    return {unit.name: spec_digest(state.topology, unit, state.restarts) for unit in state.units}


def changed(before: Desired, after: Desired) -> set[str]:
    """Units of both that a roll from one to the other starts anew."""
    old, new = digests(before), digests(after)
    return {name for name in old.keys() & new.keys() if old[name] != new[name]}


def test_it_survives_being_kept() -> None:
    state = desired().drain("decode/1/0", 3.0).switch("prefill/1/0", "decode", 2.0).restart(None)
    assert Desired.model_validate_json(state.model_dump_json()) == state
    colocated = desired(colocated=True, prefill=None)
    assert Desired.model_validate_json(colocated.model_dump_json()) == colocated


def test_drained_twice_is_drained_once() -> None:
    once = desired().drain("decode/1/0", None)
    twice = once.drain("decode/1/0", 5.0)
    assert once.drained == twice.drained == {"decode/1/0"}
    assert (once.deadlines, twice.deadlines) == ({}, {"decode/1/0": 5.0})
    assert twice.generation == 2
    assert twice.undrain("decode/1/0").undrain("decode/1/0").drained == frozenset()


@pytest.mark.parametrize("worker", ["decode/2/0", "decode", "", "decode/0/0/0", "supervisor"])
def test_a_worker_that_is_not_there(worker: str) -> None:
    for method in (Desired.drain, lambda state, name, _: state.undrain(name)):
        with pytest.raises(NotFound, match="there are prefill/0/0, prefill/1/0, decode/0/0"):
            method(desired(), worker, None)


def test_scaling_changes_one_pool_and_starts_nothing_anew() -> None:
    before = desired()
    for pool in ("prefill", "decode", "router"):
        after = before.scale(pool, 3, None)
        assert len(after.units) == len(before.units) + (2 if pool == "router" else 1)
        assert not changed(before, after)
    assert desired(colocated=True, prefill=None).scale("colocated", 5, None).topology.decode.replicas == 5


@pytest.mark.parametrize("replicas", [0, -1, 1025, 10**30])
def test_numbers_that_no_pool_has(replicas: int) -> None:
    with pytest.raises(InvalidRequest, match="replicas: found"):
        desired().scale("decode", replicas, None)


@pytest.mark.parametrize("pool", ["colocated", "decodes", "", "decode/0/0"])
def test_pools_that_are_not_there(pool: str) -> None:
    with pytest.raises(InvalidRequest, match=r"pool: found .*; expected prefill, decode or router"):
        desired().scale(pool, 2, None)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model": {"path": "other"}}, "model.path"),
        ({"model": {"path": "m", "context": 1024}}, "model.context"),
        ({"model": {"path": "m", "dtype": "bfloat16"}}, "model.dtype"),
        ({"colocated": True, "prefill": None}, "colocated"),
        ({"name": "other"}, "name"),
        ({"router": {"grpc": "127.0.0.1:1"}}, "router.grpc"),
        ({"router": {"http": "127.0.0.1:1"}}, "router.http"),
        ({"security": {"bind": "127.0.0.2"}}, "security.bind"),
        ({"security": {"curve": "on"}}, "security.curve"),
        ({"decode": {"layout": {"dp": 2}}}, "decode.layout"),
    ],
)
def test_what_cannot_change_while_it_runs(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: found .* cannot change while the cluster runs") as caught:
        desired().apply(topology(**fields), None)
    assert caught.value.field == field
    again = pickle.loads(pickle.dumps(caught.value))  # on its way from the supervisor to the command
    assert (str(again), again.field) == (str(caught.value), field)


@pytest.mark.parametrize(
    ("fields", "units"),
    [
        ({"decode": {"replicas": 2, "slots": 8}}, {"decode/0/0", "decode/1/0"}),
        ({"decode": {"replicas": 2, "layout": {"tp": 2}}}, {"decode/0/0", "decode/1/0"}),
        ({"prefill": {"replicas": 1, "chunk_tokens": 64}}, {"prefill/0/0"}),
        ({"router": {"max_queue": 1}}, {"router/0"}),
        ({"kv_transfer": {"lease_s": 3.0}}, {"prefill/0/0", "prefill/1/0", "decode/0/0", "decode/1/0"}),
        ({"hosts": {"count": 3}}, set()),
    ],
)
def test_only_what_has_changed_starts_anew(fields: dict[str, Any], units: set[str]) -> None:
    before = desired()
    assert changed(before, before.apply(topology(**fields), None)) == units


def test_a_restart_is_of_all() -> None:
    before = desired()
    assert changed(before, before.restart(None)) == set(digests(before))


def test_what_leaves_the_topology_is_forgotten() -> None:
    state = desired().drain("decode/1/0", None).switch("prefill/1/0", "decode", 1.0)
    smaller = state.scale("decode", 1, None).scale("prefill", 1, None)
    assert not smaller.drained
    assert not smaller.roles


def test_a_switch_and_back() -> None:
    before = desired()
    there = before.switch("decode/1/0", "prefill", 2.0)
    assert [unit.role for unit in there.units] == ["prefill", "prefill", "decode", "prefill", None]
    assert changed(before, there) == {"decode/1/0"}
    assert not changed(before, there.switch("decode/1/0", "decode", 2.0))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"decode": {"replicas": 2, "layout": {"tp": 2}}}, "decode.layout"),
        ({"decode": {"replicas": 2, "device": "cuda"}}, "decode.device"),
        ({"decode": {"replicas": 2, "gpu_fraction": 0.5}}, "decode.gpu_fraction"),
    ],
)
def test_a_switch_between_unequal_layouts(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: found .*; expected that of prefill"):
        desired(**fields).switch("decode/1/0", "prefill", 2.0)
    with pytest.raises(InvalidRequest, match=f"^{field}"):
        desired().switch("decode/1/0", "prefill", 2.0).apply(topology(**fields), None)


def test_a_switch_that_would_leave_nobody() -> None:
    state = desired(decode={"replicas": 1})
    with pytest.raises(InvalidRequest, match="no engine would be left for decode"):
        state.switch("decode/0/0", "prefill", 2.0)
    with pytest.raises(InvalidRequest, match="no engine would be left for decode"):
        desired().drain("decode/0/0", None).switch("decode/1/0", "prefill", 2.0)
    with pytest.raises(InvalidRequest, match="no engine would be left for decode"):
        desired().switch("decode/0/0", "prefill", 2.0).scale("decode", 1, None)


@pytest.mark.parametrize("role", ["router", "colocated", "", "PREFILL"])
def test_roles_that_are_not_there(role: Any) -> None:
    with pytest.raises(InvalidRequest, match="role: found"):
        desired().switch("decode/1/0", role, 2.0)
    with pytest.raises(InvalidRequest, match="a router has no other role"):
        desired().switch("router/0", "decode", 2.0)
