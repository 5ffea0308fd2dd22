"""Shows a cluster coming up: a bar for each worker on a terminal, a line for each step elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from splitserve.deploy.status import ClusterStatus


class StatusView(Protocol):
    """Follows a start. A context manager, so that a terminal is left as it was."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, status: ClusterStatus) -> None: ...


class LineView:
    """A line on stderr whenever a unit gets further."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, status: ClusterStatus) -> None:
        for unit in status.units:
            if self._shown.get(unit.name) != unit.state:
                self._shown[unit.name] = unit.state
                print(f"{unit.name}: {unit.state}", file=sys.stderr, flush=True)


class BarView:
    """A bar for each unit, moving with the tensors that its workers have loaded."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<16}"), BarColumn(), TextColumn("{task.fields[state]}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, status: ClusterStatus) -> None:
        for unit in status.units:
            if unit.name not in self._tasks:
                self._tasks[unit.name] = self._progress.add_task(unit.name, total=None, state=unit.state)
            done, total = (1, 1) if unit.state == "ready" else unit.tensors
            self._progress.update(self._tasks[unit.name], completed=done, total=total or None, state=unit.state)


def make_view() -> StatusView:
    return BarView() if sys.stderr.isatty() else LineView()
