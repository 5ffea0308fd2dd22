"""The colocated cluster that has the same to run on as a split one."""

from __future__ import annotations

from splitserve.cluster.errors import InvalidRequest
from splitserve.cluster.topology import Topology

LONGEST_NAME = 40


def named(topology: Topology, suffix: str) -> Topology:
    """The same cluster by another name, so that one that runs is not touched; over gRPC alone."""
    name = f"{topology.name[: LONGEST_NAME - len(suffix) - 1]}-{suffix}"
    return topology.model_copy(update={"name": name, "router": topology.router.model_copy(update={"http": None})})


def colocated(topology: Topology) -> Topology:
    """As many ranks as both pools of `topology` have, which do both, with the memory and threads of all.

    Raises InvalidRequest where it has no two pools, or their ranks cannot be shared among engines of decode's layout.
    """
    prefill, decode = topology.prefill, topology.decode
    if prefill is None:
        raise InvalidRequest("colocated", True, "give a topology with a prefill and a decode pool")
    if prefill.device != decode.device:
        raise InvalidRequest("prefill.device", prefill.device, f"decode has {decode.device}: give both the same")
    counts = {pool: pool.replicas * pool.layout.ranks for pool in (prefill, decode)}
    ranks, wanted = sum(counts.values()), decode.layout.ranks
    if ranks % wanted:
        expected = f"{ranks} ranks of both pools make no whole engines of {wanted}: give prefill as many, or a multiple"
        raise InvalidRequest("prefill.layout", prefill.layout.ranks, expected)
    memory = sum(pool.kv_memory * count for pool, count in counts.items()) // ranks
    threads = sum(pool.threads * count for pool, count in counts.items()) // ranks
    both = {
        "replicas": ranks // wanted,
        "chunk_tokens": prefill.chunk_tokens,
        "kv_memory": memory,
        "threads": max(1, threads),
        "prefix_cache": prefill.prefix_cache,
        "max_sequences": max(prefill.max_sequences, decode.max_sequences),
    }
    update = {"colocated": True, "prefill": None, "decode": decode.model_copy(update=both)}
    return topology.model_copy(update=update)
