"""Talks to a cluster's supervisor as a Ray driver.

Ray reads its environment when it is imported: call `prepare_ray` before importing this module.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from splitserve.cluster.errors import StartupError, WorkerUnavailable
from splitserve.cluster.log import render
from splitserve.deploy.cluster_spec import ClusterSpec
from splitserve.deploy.cluster_state import namespace
from splitserve.deploy.preflight import check_address
from splitserve.deploy.progress import StatusView
from splitserve.deploy.status import ClusterStatus, UnitStatus
from splitserve.deploy.supervisor import SUPERVISOR, Supervisor

ANSWER_S = 60.0
POLL_S = 0.2
CALLS_AT_ONCE = 8
SHOWN_LOG_LINES = 15


@contextlib.contextmanager
def session(cluster: str, address: str) -> Iterator[None]:
    """Be a driver of the Ray at `address`. Raises StartupError when it cannot be joined."""
    check_address(address)
    try:
        ray.init(address, namespace=namespace(cluster), log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StartupError(f"cannot join the Ray at {address}: {reason}; start it, or name another") from error
    try:
        yield
    finally:
        ray.shutdown()


def resources() -> dict[str, float]:
    """What all nodes have together, by Ray's names (CPU, GPU, ...)."""
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return total


def has_supervisor() -> bool:
    try:
        ray.get_actor(SUPERVISOR)
    except ValueError:
        return False
    return True


def bring_up(spec: ClusterSpec, view: StatusView) -> tuple[str, ...]:
    """Start a supervisor for `spec` and wait until every unit is ready; returns the routers' endpoints.

    Raises StartupError with the reason and the last log lines of the first worker that dies on the way.
    """
    ray.remote(Supervisor).options(
        name=SUPERVISOR,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=CALLS_AT_ONCE,
        num_cpus=0,
    ).remote(spec)
    with view:
        while not (now := status()).is_ready:
            view.show(now)
            if now.dead is not None:
                raise StartupError(_account(now.dead))
            time.sleep(POLL_S)
        view.show(now)
    return now.endpoints


def status() -> ClusterStatus:
    """Raises WorkerUnavailable when there is no supervisor or it does not answer."""
    answer: ClusterStatus = _ask("status")
    return answer


def logs(worker: str | None, count: int) -> list[str]:
    """The last `count` log lines of a worker, or of all. Raises NotFound for a worker that never was."""
    answer: list[str] = _ask("logs", worker, count)
    return answer


def shutdown() -> None:
    """End all workers, then the supervisor. Does nothing where there is none."""
    with contextlib.suppress(ValueError):
        supervisor = ray.get_actor(SUPERVISOR)
        with contextlib.suppress(RayError):
            ray.get(supervisor.shutdown.remote(), timeout=ANSWER_S)
        ray.kill(supervisor)


def _account(unit: UnitStatus) -> str:
    """Why a unit did not start, with its last words."""
    worker = unit.reason.partition(":")[0]
    words = "\n".join(f"    {render(line)}" for line in logs(worker, SHOWN_LOG_LINES))
    return f"{unit.reason}\nlast lines of the log of {worker}:\n{words}"


def _ask(method: str, *arguments: object) -> Any:
    try:
        supervisor = ray.get_actor(SUPERVISOR)
        return ray.get(getattr(supervisor, method).remote(*arguments), timeout=ANSWER_S)
    except RayTaskError as error:
        raise error.cause from error
    except (ValueError, RayError) as error:
        raise WorkerUnavailable(f"the supervisor does not answer: {error}") from error
