"""What a cluster is to be, which commands change and the supervisor brings about.

All of it is one value, so that a command is one change of it: whoever asks twice, or goes away in the middle, or comes
beside another, leaves a cluster that is one of those asked for.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError

from splitserve.cluster.errors import InvalidRequest, NotFound
from splitserve.cluster.topology import Topology
from splitserve.cluster.topology_sections import Model, Role, Section
from splitserve.deploy.units import Unit, make_units

# What workers of before and after a change could not agree on while both run, or clients would have to follow.
FIXED = (
    "name",
    *(f"model.{field}" for field in Model.model_fields),
    "colocated",
    "router.grpc",
    "router.http",
    "security.bind",
    "security.curve",
)


class Desired(Section):
    """A topology, and how single units differ from it. Its methods give the changed one, or refuse naming the field.

    `drained` units are not to run. `roles`: engines that serve as another than their pool's. `deadlines`: how many
    seconds a unit that must leave may take to end what it runs; without an entry, as long as that takes. `restarts`
    counts the rolling restarts asked for, `generation` all changes.
    """

    topology: Topology
    drained: frozenset[str] = frozenset()
    roles: dict[str, Role] = Field(default_factory=dict)
    deadlines: dict[str, float] = Field(default_factory=dict)
    restarts: int = 0
    generation: int = 0

    @property
    def units(self) -> tuple[Unit, ...]:
        return make_units(self.topology, self.roles)

    @property
    def unserved(self) -> tuple[str, ...]:
        """Roles that no engine is to serve, and "router" where none is to run."""
        serving = {unit.role or "router" for unit in self.units if unit.name not in self.drained}
        return tuple(role for role in (*self.topology.roles, "router") if role not in serving)

    def drain(self, worker: str, deadline_s: float | None) -> Desired:
        self._unit(worker)
        return self._change(drained=self.drained | {worker}, deadlines=self._deadlines([worker], deadline_s))

    def undrain(self, worker: str) -> Desired:
        self._unit(worker)
        return self._change(drained=self.drained - {worker})

    def scale(self, pool: str, replicas: int, deadline_s: float | None) -> Desired:
        """Have so many replicas of a pool, or routers."""
        if pool not in (*self.topology.roles, "router"):
            raise InvalidRequest("pool", pool, f"expected {', '.join(self.topology.roles)} or router")
        section = "decode" if pool == "colocated" else pool
        raw = self.topology.model_dump()
        raw[section]["replicas"] = replicas
        try:
            topology = Topology.model_validate(raw)
        except ValidationError as error:
            raise InvalidRequest("replicas", replicas, error.errors()[0]["msg"]) from error
        return self.apply(topology, deadline_s)

    def apply(self, topology: Topology, deadline_s: float | None) -> Desired:
        """Be as another topology says, in a roll where that changes units that run."""
        _require_rollable(self.topology, topology)
        names = {unit.name for unit in make_units(topology)}
        roles = {name: role for name, role in self.roles.items() if name in names}
        return self._checked(
            topology=topology, drained=self.drained & names, roles=roles, deadlines=self._for_all(deadline_s)
        )

    def restart(self, deadline_s: float | None) -> Desired:
        """Start every unit anew, one after another."""
        return self._change(restarts=self.restarts + 1, deadlines=self._for_all(deadline_s))

    def switch(self, worker: str, role: Role, deadline_s: float) -> Desired:
        """Have an engine serve as `role`, with the weights that it holds."""
        unit = self._unit(worker)
        if unit.pool is None:
            raise InvalidRequest("worker", worker, "a router has no other role: name an engine")
        if role not in self.topology.roles:
            raise InvalidRequest("role", role, f"expected {' or '.join(self.topology.roles)}")
        others = {name: given for name, given in self.roles.items() if name != worker}
        roles = others if role == unit.pool else others | {worker: role}
        return self._checked(roles=roles, deadlines=self._deadlines([worker], deadline_s))

    def _unit(self, name: str) -> Unit:
        units = {unit.name: unit for unit in self.units}
        if name not in units:
            raise NotFound(f"no engine or router {name!r} here; there are {', '.join(units)}")
        return units[name]

    def _change(self, **fields: Any) -> Desired:
        return self.model_copy(update={"generation": self.generation + 1, **fields})

    def _checked(self, **fields: Any) -> Desired:
        """A change of what engines serve as, refused where that cannot be."""
        changed = self._change(**fields)
        changed._require_equal_layouts()
        for role in sorted(set(changed.unserved) - set(self.unserved)):
            raise InvalidRequest("role", role, f"no engine would be left for {role}: add one, or switch one back first")
        return changed

    def _for_all(self, deadline_s: float | None) -> dict[str, float]:
        return self._deadlines([unit.name for unit in self.units if unit.name not in self.drained], deadline_s)

    def _deadlines(self, names: list[str], deadline_s: float | None) -> dict[str, float]:
        others = {name: given for name, given in self.deadlines.items() if name not in names}
        return others if deadline_s is None else others | dict.fromkeys(names, deadline_s)

    def _require_equal_layouts(self) -> None:
        """The weights of one role serve the other only where both pools share them out alike."""
        prefill, decode = self.topology.prefill, self.topology.decode
        if not self.roles or prefill is None:
            return
        for field in ("layout", "device", "gpu_fraction"):
            one, other = getattr(prefill, field), getattr(decode, field)
            if one != other:
                expected = f"expected that of prefill, {_words(one)}, since {', '.join(self.roles)} would serve both"
                raise InvalidRequest(f"decode.{field}", _words(other), expected)


def _require_rollable(old: Topology, new: Topology) -> None:
    """Raise InvalidRequest naming the first field that cannot change while the cluster runs."""
    remedy = f"it cannot change while the cluster runs; `splitserve down {old.name}` first"
    for field in FIXED:
        before, after = _field(old, field), _field(new, field)
        if before != after:
            raise InvalidRequest(field, _words(after), f"{remedy}, or keep {_words(before)}")
    for pool in old.roles:
        before, after = old.pool(pool).layout, new.pool(pool).layout
        if before != after and max(before.dp, after.dp) > 1:  # ranks would change engines under their names
            raise InvalidRequest(f"{pool}.layout", _words(after), f"with dp over 1 {remedy}, or keep {_words(before)}")


def _field(topology: Topology, path: str) -> Any:
    value: Any = topology
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _words(value: Any) -> str:
    return " ".join(str(value).split())
