"""A cluster for the time of a measurement, in a process of its own: Ray joins no second cluster in the same one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

from splitserve.cluster.errors import SplitserveError, StartupError
from splitserve.cluster.topology_file import TopologyFile
from splitserve.deploy.launch import launch, stop
from splitserve.deploy.progress import make_view


@contextmanager
def running(file: TopologyFile, address: str | None) -> Iterator[tuple[str, ...]]:
    """The endpoints of a cluster that ends with the context, or with this process, however that ends.

    Raises StartupError with the reason why it does not start.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(file, address, theirs))
    process.start()
    theirs.close()
    try:
        try:
            answer = ours.recv()
        except EOFError:
            raise StartupError(f"the process that starts {file.topology.name} has ended") from None
        if isinstance(answer, str):
            raise StartupError(answer)
        yield answer
    finally:
        ours.close()
        process.join()


def _run(file: TopologyFile, address: str | None, parent: Connection) -> None:
    """Until the parent closes its end, or is gone."""
    with suppress(KeyboardInterrupt):
        try:
            cluster = launch(file, address, make_view())
        except SplitserveError as error:
            parent.send(str(error))
            return
        try:
            parent.send(cluster.state.endpoints)
            with suppress(EOFError):
                parent.recv()
        finally:
            stop(cluster.state)
