"""Checks before anything is started, so that what is missing is told at once and not waited for."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from splitserve.cluster.api_key_file import read_api_keys
from splitserve.cluster.cluster_key import read_cluster_key
from splitserve.cluster.errors import InsufficientResources, InvalidRequest, ModelLoadError, StartupError
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.topology import Topology
from splitserve.cluster.topology_file import TopologyFile
from splitserve.cluster.topology_sections import Router, Security, is_address
from splitserve.cluster.units import format_bytes
from splitserve.deploy.plan import Plan
from splitserve.kernels.head_sizes import runs_on_gpu
from splitserve.models.config import ModelConfig
from splitserve.models.resolve import resolve_model
from splitserve.router.certificates import Certificates

COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
GPU_COUNT_S = 120.0
CONNECT_S = 10.0
PROCESS_BYTES = 256 * 2**20  # that torch takes of every process
REMEDY = "add hosts, or ask for fewer ranks or threads"


@contextlib.contextmanager
def at_model_path(file: TopologyFile) -> Iterator[None]:
    """Whatever is wrong with the model is told with the place that names it."""
    try:
        yield
    except ModelLoadError as error:
        raise ModelLoadError(f"{file.place('model.path')}: {error}") from error


def check_weights(file: TopologyFile) -> None:
    """Raise ModelLoadError where this host has no weights of the model, unless it is to have random ones."""
    model = file.topology.model
    with at_model_path(file):
        if model.load_format == "auto" and not any(resolve_model(model.path).glob("model.safetensors*")):
            remedy = "give a folder with weights as safetensors, or load_format: dummy"
            raise ModelLoadError(f"{model.path}: found no model.safetensors and no index of shards; {remedy}")


def check_ports(router: Router) -> None:
    """Raise StartupError naming the first router address of this host that cannot be listened on."""
    for index in range(router.replicas):
        _check_port("router.grpc", router.grpc_address(index))
        if (http := router.http_address(index)) is not None:
            _check_port("router.http", http)


def _check_port(field: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        family, kind, _, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        remedy = "end what listens there, or name another address"
        raise StartupError(f"{field}: cannot listen on {address}: {error.strerror}; {remedy}") from error


def check_security(security: Security) -> None:
    """Raise StartupError naming the first file of `security` that this host's workers could not use."""
    if security.cluster_key is not None:
        read_cluster_key(Path(security.cluster_key))
    if security.tls is not None:
        Certificates(security.tls)
    if security.api_keys is not None:
        read_api_keys(Path(security.api_keys))


def check_address(address: str) -> None:
    """Raise StartupError unless something listens at a Ray's host:port, which Ray itself would wait minutes for."""
    if not is_address(address):
        raise InvalidRequest("address", address, "give host:port of a Ray head node")
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise StartupError(f"cannot join the Ray at {address}: {error}; start it, or name another") from error


def check_runnable(plan: Plan) -> None:
    """Raise StartupError for what can be planned and not run yet."""
    not_yet = "can be checked but not run yet"
    if plan.model.fp8_block is not None:
        raise StartupError(f"model.path: fp8 weights {not_yet}; use a model in bfloat16")
    for role in plan.topology.roles:
        if plan.model.moe is not None and plan.topology.pool(role).layout.dp > 1:
            raise StartupError(f"{role}.layout.dp: experts shared over several engines {not_yet}; use dp: 1")
    for pool in plan.pools:
        if pool.device == "cuda":
            _check_gpu_model(plan.model, pool.kv_layout)
        if pool.device == "cuda" and pool.layout.tp > 1 and plan.topology.model.deterministic:
            raise StartupError(f"model.deterministic: NCCL's sums over tp ranks {not_yet} that way; use tp: 1")


def _check_gpu_model(model: ModelConfig, layout: KvLayout) -> None:
    dim, value_dim = layout.head_dim, model.mla.kv_lora_rank if model.mla else layout.head_dim
    if not runs_on_gpu(dim, value_dim):
        sizes = f"{value_dim} + {dim - value_dim}" if model.mla else f"{dim}"
        raise StartupError(
            f"model.path: GPU kernels have no tiles for heads of {sizes}; expected powers of 2 from 16 on"
        )
    if model.moe is not None and layout.dtype != "bfloat16":
        raise StartupError(f"model.dtype: experts in {layout.dtype} do not run on a GPU; use bfloat16")


def check_host(plan: Plan) -> None:
    """Raise InsufficientResources where this host alone cannot carry the plan."""
    topology = plan.topology
    cpus = len(os.sched_getaffinity(0))
    for role in topology.roles:
        threads = topology.pool(role).threads
        if threads > cpus:
            asked = f"{role} asks for {threads} threads a rank"
            raise InsufficientResources(f"{asked}; this host has {cpus} CPUs: expected at most that")
    if plan.gpus:
        _check_gpus(plan.gpus, count_gpus())
    _check_memory(plan)


def check_resources(plan: Plan, available: Mapping[str, float]) -> None:
    """Raise InsufficientResources where a Ray with `available` resources cannot carry the plan."""
    cpus = int(available.get("CPU", 0))
    if plan.cpus > cpus:
        raise InsufficientResources(f"the cluster needs {plan.cpus} CPUs; this Ray has {cpus}: {REMEDY}")
    _check_gpus(plan.gpus, int(available.get("GPU", 0)))
    for section, resource in _node_resources(plan.topology).items():
        if resource not in available:
            raise InsufficientResources(f"{section}.node_resource: no node of this Ray carries {resource!r}")


def count_gpus() -> int:
    """GPUs that torch sees here, counted in a process of its own: looking would occupy memory on each."""
    command = [sys.executable, "-P", "-c", COUNT_GPUS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=GPU_COUNT_S, check=False)
    if result.returncode:
        raise StartupError(f"torch cannot count the GPUs: {result.stderr.strip().splitlines()[-1]}")
    return int(result.stdout)


def _check_gpus(needed: int, available: int) -> None:
    if needed > available:
        raise InsufficientResources(f"the cluster needs {needed} GPUs; there are {available}: {REMEDY}")


def _check_memory(plan: Plan) -> None:
    """Weights, KV and processes of the ranks that compute on the CPU must fit into memory."""
    pools = [pool for pool in plan.pools if pool.device == "cpu"]
    needed = sum((pool.weight_bytes + pool.kv_bytes + PROCESS_BYTES) * len(pool.ranks) for pool in pools)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        sizes = f"{format_bytes(needed)} for weights, KV and processes; this host has {format_bytes(memory)}"
        raise InsufficientResources(f"the cluster needs {sizes}: lower kv_memory or the number of ranks")


def _node_resources(topology: Topology) -> dict[str, str]:
    """The custom resource that each section asks its nodes to carry."""
    asked: dict[str, str | None] = {role: topology.pool(role).node_resource for role in topology.roles}
    asked["router"] = topology.router.node_resource
    return {section: resource for section, resource in asked.items() if resource is not None}
