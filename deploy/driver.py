"""Talks to a cluster's supervisor as a Ray driver.

Ray reads its environment when it is imported: call `prepare_ray` before importing this module.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from splitserve.cluster.errors import StartupError, WorkerUnavailable
from splitserve.cluster.log import render
from splitserve.deploy.cluster_spec import ClusterSpec
from splitserve.deploy.cluster_state import namespace
from splitserve.deploy.desired import Desired
from splitserve.deploy.memory import Memory
from splitserve.deploy.preflight import check_address
from splitserve.deploy.progress import StatusView
from splitserve.deploy.status import ClusterStatus, UnitStatus
from splitserve.deploy.supervisor import SUPERVISOR, Supervisor

ANSWER_S = 60.0
POLL_S = 0.2
CALLS_AT_ONCE = 8
SHOWN_LOG_LINES = 15
SAFE_FOLDER = "/"


@contextlib.contextmanager
def session(cluster: str, address: str) -> Iterator[None]:
    """Be a driver of the Ray at `address`. Raises StartupError when it cannot be joined."""
    check_address(address)
    try:
        # Workers import from their driver's working folder: that is not to be a user's, where any file may lie.
        with contextlib.chdir(SAFE_FOLDER):
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
    Memory(spec.topology.name).forget()
    ray.remote(Supervisor).options(
        name=SUPERVISOR,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=CALLS_AT_ONCE,
        num_cpus=0,
    ).remote(spec)
    return _settled(view, 0, lambda now: now.dead).endpoints


def change(method: str, *arguments: object) -> int:
    """Change what is desired of the cluster by a method of `Desired`; returns the generation to wait for.

    Raises what that method raises.
    """
    generation: int = _ask("change", method, arguments)
    return generation


def desired() -> Desired:
    """What the cluster is to be. Raises WorkerUnavailable when there is no supervisor or it does not answer."""
    answer: Desired = _ask("desired")
    return answer


def await_change(view: StatusView, generation: int) -> None:
    """Wait until all is as is desired. Raises StartupError with the last words of a unit that keeps dying."""
    _settled(view, generation, lambda now: now.failed)


def _settled(
    view: StatusView, generation: int, hopeless: Callable[[ClusterStatus], UnitStatus | None]
) -> ClusterStatus:
    """The status once it is settled. Raises StartupError about a unit that `hopeless` finds."""
    with view:
        while not (now := status()).is_settled or now.generation < generation:
            view.show(now)
            unit = hopeless(now) if now.generation >= generation else None
            if unit is not None:
                raise StartupError(_account(unit))
            time.sleep(POLL_S)
        view.show(now)
    return now


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
    return f"{unit.reason}\nlast lines of the log of {worker}:\n{words}" if words else unit.reason


def _ask(method: str, *arguments: object) -> Any:
    try:
        supervisor = ray.get_actor(SUPERVISOR)
        return ray.get(getattr(supervisor, method).remote(*arguments), timeout=ANSWER_S)
    except RayTaskError as error:
        raise error.cause from error
    except (ValueError, RayError) as error:
        raise WorkerUnavailable(f"the supervisor does not answer: {error}") from error
