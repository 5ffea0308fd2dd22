"""Ray's own multi-node test cluster, in a process of its own: a head and a node for each custom resource named.

It prints the head's address once all nodes are there, and ends with its standard input.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main(resources: list[str]) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for resource in resources:
        cluster.add_node(num_cpus=2, resources={resource: 1})
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main(sys.argv[1:])
