from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitserve.cluster.topology import Topology
from splitserve.cluster.topology_file import load_topology, load_topology_file
from splitserve.deploy.actors import ordinal
from splitserve.deploy.default_topology import default_topology
from splitserve.deploy.plan import make_plan
from splitserve.deploy.running_unit import environment
from splitserve.deploy.units import make_units
from splitserve.models.config import ModelConfig
from splitserve.models.resolve import SMOLLM2, load_model_config


@pytest.fixture
def smollm2() -> ModelConfig:
    return load_model_config(SMOLLM2)


def topology(**fields: object) -> Topology:
    return Topology.model_validate({"name": "t", "model": {"path": "m"}, **fields})


def test_one_of_each_by_default() -> None:
    units = make_units(topology())
    assert [unit.workers for unit in units] == [("prefill/0/0",), ("decode/0/0",), ("router/0",)]
    assert [unit.is_router for unit in units] == [False, False, True]


def test_ranks_count_over_a_replica_and_engines_by_dp() -> None:
    decode = {"replicas": 2, "layout": {"tp": 3, "dp": 2}}
    units = make_units(topology(decode=decode, colocated=True, router={"replicas": 2}))
    workers = {unit.name: unit.workers for unit in units}
    assert list(workers) == [
        "colocated/0/0", "colocated/0/1", "colocated/1/0", "colocated/1/1", "router/0", "router/1",
    ]  # fmt: skip
    assert workers["colocated/1/1"] == ("colocated/1/3", "colocated/1/4", "colocated/1/5")
    assert [(rank.dp_rank, rank.tp_rank) for rank in units[1].ranks] == [(1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize(
    ("gpus", "devices", "colocated"), [(0, ["cpu", "cpu"], False), (1, ["cuda"], True), (4, ["cuda", "cuda"], False)]
)
def test_a_default_topology_suits_the_host(
    tmp_path: Path, smollm2: ModelConfig, gpus: int, devices: list[str], colocated: bool
) -> None:
    name, text = default_topology("/models/Some_Model-1.5B.Q4.gguf", smollm2, cpus=64, gpus=gpus)
    file = tmp_path / "topology.yaml"
    file.write_text(text)
    made = load_topology(file)
    assert name == made.name == "some-model-1-5b-q4"
    assert [made.pool(role).device for role in made.roles] == devices
    assert made.colocated is colocated
    assert all(made.pool(role).threads <= 16 for role in made.roles)


@pytest.mark.parametrize("gpus", [0, 1, 2])
@pytest.mark.parametrize("change", [{}, {"max_position_embeddings": 1024}, {"num_layers": 80, "num_kv_heads": 64}])
def test_a_default_topology_suits_the_model(
    tmp_path: Path, smollm2: ModelConfig, change: dict[str, Any], gpus: int
) -> None:
    model = replace(smollm2, **change)
    file = tmp_path / "topology.yaml"
    file.write_text(default_topology("/models/m", model, cpus=4, gpus=gpus)[1])
    plan = make_plan(load_topology_file(file), model)
    assert plan.topology.model.context == min(2048, model.max_position_embeddings)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/", "default"),
        ("模型", "default"),
        ("x" * 60, "x" * 40),
        ("/1e5", "model-1e5"),
        ("7", "model-7"),
        ("7b", "7b"),
    ],
)
def test_a_default_topology_has_a_valid_name(tmp_path: Path, smollm2: ModelConfig, path: str, name: str) -> None:
    file = tmp_path / "topology.yaml"
    file.write_text(default_topology(path, smollm2, 1, 0)[1])
    assert load_topology(file).name == name


@pytest.mark.parametrize(("gpu", "visible", "number"), [("3", None, 3), ("3", "", 3), ("5", "4,5,7", 1), ("4", "4", 0)])
def test_a_gpu_has_the_number_that_the_process_gives_it(gpu: str, visible: str | None, number: int) -> None:
    assert ordinal(gpu, visible) == number


@pytest.mark.parametrize(("host_cpus", "hosts", "brief"), [(4, 1, True), (5, 1, False), (4, 2, False)])
def test_threads_that_must_share_cores_spin_briefly(host_cpus: int, hosts: int, brief: bool) -> None:
    shared = topology(prefill={"threads": 2}, decode={"threads": 2}, hosts={"count": hosts})
    decode = make_units(shared)[1]
    variables = environment(shared, decode, host_cpus)
    assert variables["OMP_NUM_THREADS"] == "2"
    assert ("GOMP_SPINCOUNT" in variables) is brief
