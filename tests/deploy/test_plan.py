from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from splitserve.cluster.errors import TopologyError, TopologyErrors
from splitserve.cluster.topology import BOUNCE_BYTES, Topology
from splitserve.cluster.topology_file import load_topology_file
from splitserve.deploy.check import render_plan
from splitserve.deploy.placement import Slot
from splitserve.deploy.plan import Plan, make_plan
from splitserve.deploy.supervisor import _kv_path
from splitserve.models.config import ModelConfig

ROOT = Path(__file__).parents[2]
TOPOLOGIES = ROOT / "deploy" / "topologies"
DEEPSEEK_V3 = ModelConfig.from_hf(json.loads((ROOT / "models" / "configs" / "deepseek-v3.json").read_text()))
TINY_MOE = ModelConfig.from_hf(json.loads((ROOT / "examples" / "tiny_moe" / "model" / "config.json").read_text()))


def llama(layers: int, heads: int, kv_heads: int, head_dim: int, wide: int, vocab: int, context: int) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": heads * head_dim,
            "intermediate_size": wide,
            "max_position_embeddings": context,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "vocab_size": vocab,
        }
    )


SMOLLM2 = llama(30, 9, 3, 64, 1536, 49152, 8192)
LLAMA_8B = llama(32, 32, 8, 128, 14336, 128256, 131072)
AS_QWEN3_8B = llama(36, 32, 8, 128, 12288, 151936, 40960)  # the same shapes but for the norms of its heads
MODELS = {
    "smollm2-135m-instruct": SMOLLM2,
    "deepseek-v3": DEEPSEEK_V3,
    "models/Llama-3.1-8B-Instruct": LLAMA_8B,
    "/models/Qwen3-8B": AS_QWEN3_8B,
    "examples/tiny_moe/model": TINY_MOE,
}


def plan_of(path: Path) -> Plan:
    file = load_topology_file(path)
    return make_plan(file, MODELS[file.topology.model.path])


def plan_text(folder: Path, raw: dict[str, Any], model: ModelConfig = SMOLLM2) -> Plan:
    """Plan a topology given as plain values; the name and the model need not be there."""
    path = folder / "t.yaml"
    raw = {"name": "t", **raw, "model": {"path": "m", **raw.get("model", {})}}
    path.write_text(yaml.safe_dump(json.loads(json.dumps(raw)), sort_keys=False))  # a copy, so that nothing is aliased
    return make_plan(load_topology_file(path), model)


def faults_of(folder: Path, raw: dict[str, Any], model: ModelConfig = SMOLLM2) -> dict[str, TopologyError]:
    with pytest.raises(TopologyErrors) as caught:
        plan_text(folder, raw, model)
    lines = (folder / "t.yaml").read_text().splitlines()
    for error in caught.value.errors:
        sections = [*error.field.split("."), "name"]
        assert any(section in lines[error.line - 1] for section in sections), error
    return {error.field: error for error in caught.value.errors}


@pytest.mark.parametrize("path", sorted(TOPOLOGIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_topologies_plan(path: Path) -> None:
    plan = plan_of(path)
    names = [rank.name for pool in plan.pools for rank in pool.ranks]
    assert len(names) == len(set(names)) > 0
    gpus = [rank.slot for pool in plan.pools for rank in pool.ranks if rank.slot.device != "cpu"]
    shared = any(plan.topology.pool(role).gpu_fraction < 1 for role in plan.topology.roles)
    assert plan.gpus == len(set(gpus))
    assert shared or len(gpus) == plan.gpus
    text = render_plan(plan)
    assert text.startswith(f"{path.stem}: ")
    assert all(pool.role in text for pool in plan.pools)
    assert max(map(len, text.splitlines())) <= 120


def test_cpu_demo() -> None:
    plan = plan_of(TOPOLOGIES / "cpu-demo.yaml")
    prefill, decode = plan.pools
    assert prefill.weight_bytes == decode.weight_bytes == 4 * 134_515_008
    assert prefill.kv_layout.bytes_per_token == 46_080
    assert (prefill.pages, prefill.kv_tokens, prefill.kv_bytes) == (113, 113 * 64, 113 * 64 * 46_080)
    assert [(link.prefill, link.decode, link.transport) for link in plan.links] == [
        ("prefill/0/0", "decode/0/0", "shm")
    ]
    assert (plan.cpus, plan.gpus, plan.hosts) == (4, 0, 1)


def test_three_ranks_hold_three_times_the_tokens(tmp_path: Path) -> None:
    plan = plan_text(
        tmp_path, {"prefill": {"layout": {"tp": 3}, "kv_memory": "90MiB"}, "decode": {"kv_memory": "90MiB"}}
    )
    prefill, decode = plan.pools
    assert prefill.kv_tokens // 64 == 3 * 90 * 2**20 // (64 * 46_080)
    assert decode.kv_tokens // 64 == 90 * 2**20 // (64 * 46_080)
    assert [rank.name for rank in prefill.ranks] == ["prefill/0/0", "prefill/0/1", "prefill/0/2"]
    assert [engine.id for engine in prefill.engines] == ["prefill/0/0"]


def test_four_gpus() -> None:
    plan = plan_of(TOPOLOGIES / "gpu-1p-tp2-1d-dp2.yaml")
    prefill, decode = plan.pools
    assert [rank.slot for rank in prefill.ranks] == [Slot(0, "cuda:0"), Slot(0, "cuda:1")]
    assert [(engine.id, engine.ranks[0].name, engine.ranks[0].slot) for engine in decode.engines] == [
        ("decode/0/0", "decode/0/0", Slot(0, "cuda:2")),
        ("decode/0/1", "decode/0/1", Slot(0, "cuda:3")),
    ]


def test_deepseek_v3() -> None:
    plan = plan_of(TOPOLOGIES / "deepseek-v3-16x8.yaml")
    prefill, decode = plan.pools
    assert (len(prefill.engines), len(prefill.ranks)) == (16, 64)
    assert (len(decode.engines), len(decode.ranks)) == (64, 64)
    assert all(len(engine.hosts) == 1 for engine in prefill.engines)
    assert prefill.engines[9].id == "prefill/1/1"
    assert [rank.name for rank in prefill.engines[9].ranks] == [f"prefill/1/{rank}" for rank in range(4, 8)]
    assert prefill.kv_layout.bytes_per_token == decode.kv_layout.bytes_per_token == 70_272
    assert (plan.gpus, plan.hosts, len(plan.links)) == (128, 16, 16 * 64)
    assert {link.transport for link in plan.links} == {"nccl"}
    text = render_plan(plan)
    assert "671.0B parameters" in text
    assert "70,272 bytes of KV a token" in text
    assert len(text.splitlines()) < 30


def test_mla_keeps_the_whole_latent_on_every_rank(tmp_path: Path) -> None:
    pool = {"layout": {"tp": 2, "ep": 2}, "kv_memory": "1GiB"}
    plan = plan_text(tmp_path, {"prefill": pool, "decode": pool}, DEEPSEEK_V3)
    assert plan.pools[0].kv_layout.bytes_per_token == 70_272 * 2  # float32


def test_engines_stay_within_a_host_unless_they_are_larger(tmp_path: Path) -> None:
    cuda = {"device": "cuda", "kv_memory": "8GiB"}
    raw = {
        "hosts": {"count": 5, "gpus": 4},
        "security": {"bind": "node"},
        "prefill": cuda | {"replicas": 3, "layout": {"tp": 2}},
        "decode": cuda | {"layout": {"tp": 8}},
    }
    plan = plan_text(tmp_path, raw, LLAMA_8B)
    prefill, decode = plan.pools
    assert [engine.hosts for engine in prefill.engines] == [{0}, {0}, {1}]
    assert decode.engines[0].hosts == {2, 3}
    assert [rank.slot.device for rank in decode.ranks] == [f"cuda:{gpu}" for gpu in (0, 1, 2, 3, 0, 1, 2, 3)]


def test_transports_follow_the_hosts(tmp_path: Path) -> None:
    raw: dict[str, Any] = {"prefill": {"replicas": 2}, "decode": {"replicas": 2}}
    assert {link.transport for link in plan_text(tmp_path, raw).links} == {"shm"}
    raw["kv_transfer"] = {"transport": "tcp"}
    assert {link.transport for link in plan_text(tmp_path, raw).links} == {"tcp"}
    raw |= {"kv_transfer": {"transport": "auto"}, "hosts": {"count": 2}, "security": {"bind": "node"}}
    assert [link.transport for link in plan_text(tmp_path, raw).links] == ["shm", "tcp", "tcp", "shm"]
    raw |= {"kv_transfer": {"transport": "shm"}}
    assert "different hosts" in faults_of(tmp_path, raw)["kv_transfer.transport"].expected


@pytest.mark.parametrize(
    ("device", "hosts", "path"),
    [
        ("cpu", 1, "shm"),
        ("cpu", 2, "shm within a host, tcp between hosts"),
        ("cuda", 1, "cuda_ipc"),
        ("cuda", 2, "cuda_ipc within a host, nccl between hosts"),
    ],
)
def test_status_names_the_ways_of_kv(device: str, hosts: int, path: str) -> None:
    pool = {"device": device, "kv_memory": "1GiB"}
    pools = {"prefill": pool, "decode": pool, "hosts": {"count": hosts, "gpus": 2}}
    assert _kv_path(Topology.model_validate({"name": "t", "model": {"path": "m"}, **pools})) == path


def test_kv_goes_from_gpu_to_gpu_where_both_pools_have_them(tmp_path: Path) -> None:
    cuda = {"device": "cuda", "kv_memory": "1GiB"}
    raw: dict[str, Any] = {"prefill": cuda, "decode": cuda | {"replicas": 2}, "hosts": {"gpus": 4}}
    plan = plan_text(tmp_path, raw)
    assert {link.transport for link in plan.links} == {"cuda_ipc"}
    assert "2 engine pairs over cuda_ipc" in render_plan(plan)
    assert plan.topology.staging == 1 << 30
    raw |= {"hosts": {"count": 2, "gpus": 2}, "security": {"bind": "node"}}
    assert [link.transport for link in plan_text(tmp_path, raw).links] == ["cuda_ipc", "nccl"]
    for transport in ("nccl", "tcp"):
        raw["kv_transfer"] = {"transport": transport}
        assert {link.transport for link in plan_text(tmp_path, raw).links} == {transport}
    raw["kv_transfer"] = {"transport": "cuda_ipc"}
    assert "expected auto, nccl or tcp" in faults_of(tmp_path, raw)["kv_transfer.transport"].expected


@pytest.mark.parametrize("transport", ["cuda_ipc", "nccl"])
def test_ways_between_gpus_need_both_pools_on_gpus(tmp_path: Path, transport: str) -> None:
    raw: dict[str, Any] = {"decode": {"device": "cuda", "kv_memory": "1GiB"}, "hosts": {"gpus": 1}}
    assert {link.transport for link in plan_text(tmp_path, raw).links} == {"shm"}
    raw["kv_transfer"] = {"transport": transport}
    assert "both pools on GPUs" in faults_of(tmp_path, raw)["kv_transfer.transport"].expected


def test_communicators_between_hosts_count_as_memory_of_both(tmp_path: Path) -> None:
    cuda = {"device": "cuda", "kv_memory": "3GiB"}
    raw: dict[str, Any] = {"prefill": cuda, "decode": cuda, "hosts": {"gpus": 2, "gpu_memory": "8GiB"}}
    topology = plan_text(tmp_path, raw).topology
    assert topology.gpu_staging("prefill") == topology.fetch_staging + BOUNCE_BYTES
    assert topology.gpu_staging("decode") == topology.staging + BOUNCE_BYTES
    raw["prefill"] = cuda | {"prefix_cache": False}
    topology = plan_text(tmp_path, raw).topology
    assert topology.gpu_staging("prefill") == BOUNCE_BYTES, "nothing that it could fetch"
    assert topology.gpu_staging("decode") == topology.staging + BOUNCE_BYTES
    raw["prefill"] = cuda
    raw["kv_transfer"] = {"transport": "nccl", "link_memory": "1792MiB", "staging": "2304MiB"}
    faults = faults_of(tmp_path, raw)
    assert set(faults) == {"prefill.kv_memory", "decode.kv_memory"}
    assert "2.12 GiB of staging" in faults["prefill.kv_memory"].expected
    assert "4.12 GiB of staging" in faults["decode.kv_memory"].expected


def test_staging_on_a_gpu_counts_as_memory_of_decode(tmp_path: Path) -> None:
    cuda = {"device": "cuda", "kv_memory": "1GiB"}
    raw: dict[str, Any] = {"prefill": cuda, "decode": cuda, "hosts": {"gpus": 2, "gpu_memory": "8GiB"}}
    raw["kv_transfer"] = {"staging": "7GiB"}
    faults = faults_of(tmp_path, raw)
    assert set(faults) == {"decode.kv_memory"}
    assert "7.12 GiB of staging" in faults["decode.kv_memory"].expected


def test_pools_of_different_nodes_share_no_host(tmp_path: Path) -> None:
    raw: dict[str, Any] = {"prefill": {"node_resource": "p"}, "decode": {"node_resource": "d"}}
    assert "hosts.count" in faults_of(tmp_path, raw)
    raw |= {"hosts": {"count": 2}, "security": {"bind": "node"}}
    assert [link.transport for link in plan_text(tmp_path, raw).links] == ["tcp"]


def test_several_hosts_need_more_than_loopback(tmp_path: Path) -> None:
    fault = faults_of(tmp_path, {"hosts": {"count": 2}})["security.bind"]
    assert (fault.found, fault.line) == ("127.0.0.1", 1)
    assert "expected node" in fault.expected


def test_layout_faults_are_told_together(tmp_path: Path) -> None:
    raw = {
        "model": {"context": 10000},
        "prefill": {"layout": {"tp": 2}},
        "decode": {"layout": {"tp": 3, "dp": 2, "ep": 6}},
    }
    faults = faults_of(tmp_path, raw)
    assert faults.keys() == {"model.context", "prefill.layout.tp", "decode.layout.ep"}
    assert "end at 8192" in faults["model.context"].expected
    assert faults["prefill.layout.tp"].expected.endswith("expected 1, 3")
    assert faults["decode.layout.ep"].expected.startswith("expected 1:")


@pytest.mark.parametrize(
    ("layout", "expected"),
    [({"tp": 2, "dp": 4, "ep": 4}, "tp x dp, which is 8"), ({"dp": 3, "ep": 3}, "divisor of the 256 routed experts")],
)
def test_expert_parallelism_spans_the_replica(tmp_path: Path, layout: dict[str, int], expected: str) -> None:
    raw = {"prefill": {"kv_memory": "1GiB"}, "decode": {"layout": layout, "kv_memory": "1GiB"}}
    assert expected in faults_of(tmp_path, raw, DEEPSEEK_V3)["decode.layout.ep"].expected


def test_replicated_kv_heads_are_allowed(tmp_path: Path) -> None:
    plan = plan_text(tmp_path, {"prefill": {"layout": {"tp": 16}}}, LLAMA_8B)
    assert plan.pools[0].kv_layout.heads_per_rank == 1


def test_kv_must_hold_one_whole_sequence(tmp_path: Path) -> None:
    needed = 2048 * 46_080
    fault = faults_of(tmp_path, {"decode": {"kv_memory": needed - 1}})["decode.kv_memory"]
    assert f"({needed} bytes)" in fault.expected
    assert plan_text(tmp_path, {"decode": {"kv_memory": needed}}).pools[1].kv_tokens == 2048


def test_staging_must_hold_a_token_of_a_layer(tmp_path: Path) -> None:
    """With less, transfers would wait for room that never comes."""
    needed = 46_080 // 30
    fault = faults_of(tmp_path, {"kv_transfer": {"staging": needed - 1}})["kv_transfer.staging"]
    assert f"takes {needed} bytes" in fault.expected
    assert plan_text(tmp_path, {"kv_transfer": {"staging": needed}}).topology.staging == needed


def test_gpu_memory(tmp_path: Path) -> None:
    cuda: dict[str, Any] = {"device": "cuda", "kv_memory": "70GiB"}
    raw: dict[str, Any] = {"hosts": {"gpus": 2}, "prefill": cuda, "decode": cuda, "model": {"dtype": "bfloat16"}}
    faults = faults_of(tmp_path, raw, LLAMA_8B)
    assert faults.keys() == {"prefill.kv_memory", "decode.kv_memory"}
    assert "leave" in faults["decode.kv_memory"].expected
    raw["hosts"]["gpu_memory"] = "8GB"
    assert "share the model over more ranks" in faults_of(tmp_path, raw, LLAMA_8B)["decode.kv_memory"].expected


def test_ranks_share_a_gpu(tmp_path: Path) -> None:
    pool: dict[str, Any] = {"device": "cuda", "kv_memory": "1GiB", "gpu_fraction": 0.3}
    raw: dict[str, Any] = {"hosts": {"gpus": 2}, "prefill": pool | {"replicas": 4}, "decode": pool}
    plan = plan_text(tmp_path, raw)
    places = [rank.slot.device for pool in plan.pools for rank in pool.ranks]
    assert places == ["cuda:0", "cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert plan.gpus == 2
    assert "hosts" in faults_of(tmp_path, raw | {"hosts": {"gpus": 1}})
    raw["decode"] = pool | {"kv_memory": "30GiB"}
    assert "on 30% of a GPU" in faults_of(tmp_path, raw)["decode.kv_memory"].expected
    raw["decode"] = pool | {"layout": {"tp": 2}}
    assert "ranks need their own GPUs" in faults_of(tmp_path, raw)["decode.layout"].expected


@pytest.mark.parametrize(
    ("hosts", "tp", "field"),
    [
        ({}, 1, "hosts"),
        ({"gpus": 1}, 1, "hosts"),
        ({"gpus": 3}, 2, "hosts"),
        ({"count": 2, "gpus": 3}, 4, "prefill.layout.tp"),
        ({"count": 3, "gpus": 2}, 4, "hosts"),
    ],
)
def test_too_few_gpus(tmp_path: Path, hosts: dict[str, int], tp: int, field: str) -> None:
    pool: dict[str, Any] = {"device": "cuda", "layout": {"tp": tp}, "kv_memory": "8GiB"}
    raw = {"hosts": hosts, "security": {"bind": "node"}, "prefill": pool, "decode": pool}
    assert field in faults_of(tmp_path, raw, LLAMA_8B)
