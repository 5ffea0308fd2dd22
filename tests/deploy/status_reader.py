"""Prints a cluster's status for each line that comes: `splitserve status --json`, but Ray is imported once."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from splitserve.deploy.cluster_state import ClusterFolder
from splitserve.deploy.ray_environment import prepare_ray


def main(name: str) -> None:
    folder = ClusterFolder(name)
    state = folder.read()
    assert state is not None
    prepare_ray(folder.token)
    from splitserve.deploy import driver

    with driver.session(name, state.address):
        for _ in sys.stdin:
            print(json.dumps(asdict(driver.status())), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
