"""What a host remembers of the clusters started from it, so that later commands find them.

${XDG_STATE_HOME:-~/.local/state}/splitserve/<cluster>/
    cluster.json   where it runs (ClusterState); there is none while it is down
    lock           held by a command that starts or stops it
    token          secret of the Ray that `splitserve up` started
    ray.log        what that Ray printed
    logs/          a file per worker of this host
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from splitserve.cluster import segment_files
from splitserve.cluster.errors import NotFound, StartupError
from splitserve.deploy.processes import Process, kill_session


@dataclass(frozen=True)
class LocalRay:
    """The Ray that `splitserve up` started: its owner process and where it keeps its sockets."""

    owner: Process
    folder: str


@dataclass(frozen=True)
class ClusterState:
    """Where a cluster runs. `ray` is None where it joined a Ray that somebody else runs."""

    name: str
    address: str
    topology: str
    endpoints: tuple[str, ...]
    ray: LocalRay | None

    @property
    def namespace(self) -> str:
        return namespace(self.name)


def namespace(cluster: str) -> str:
    """The Ray namespace that a cluster's actors live in."""
    return f"splitserve/{cluster}"


@dataclass(frozen=True)
class ClusterFolder:
    """A cluster's folder on this host."""

    name: str

    @property
    def path(self) -> Path:
        return state_home() / self.name

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def ray_log(self) -> Path:
        return self.path / "ray.log"

    @property
    def token(self) -> Path:
        return self.path / "token"

    @property
    def _state(self) -> Path:
        return self.path / "cluster.json"

    def make(self) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the cluster's lock; waits for the command that has it."""
        self.make()
        with (self.path / "lock").open("w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def write(self, state: ClusterState) -> None:
        write_atomically(self._state, json.dumps(asdict(state), indent=2) + "\n")

    def read(self) -> ClusterState | None:
        """The state on file, be the cluster alive or not. Raises StartupError where it cannot be read."""
        try:
            raw = json.loads(self._state.read_text(encoding="utf-8"))
            ray = raw.pop("ray")
            local = LocalRay(Process(**ray["owner"]), ray["folder"]) if ray else None
            return ClusterState(**(raw | {"endpoints": tuple(raw["endpoints"])}), ray=local)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            remedy = f"if cluster {self.name} does not run, remove it"
            raise StartupError(f"{self._state}: not what this version writes ({error}); {remedy}") from error

    def forget(self) -> None:
        self._state.unlink(missing_ok=True)

    def live(self) -> ClusterState | None:
        """The state of a running cluster. What a dead owner of a local Ray left behind is swept away first."""
        state = self.read()
        if state is None or state.ray is None or state.ray.owner.is_alive():
            return state
        sweep(self, state.ray)
        return None


def state_home() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home) / "splitserve"


def sweep(folder: ClusterFolder, ray: LocalRay) -> None:
    """End what a local Ray's owner left: its session's processes, sockets, shared memory and the state file."""
    kill_session(ray.owner)
    shutil.rmtree(ray.folder, ignore_errors=True)
    segment_files.sweep(folder.name)
    folder.token.unlink(missing_ok=True)
    folder.forget()


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content at once; only its owner may read it."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def running_clusters() -> list[ClusterState]:
    """All clusters that this host knows to run, in order of their names. Files that cannot be read are told of."""
    home, states = state_home(), []
    for name in sorted(entry.name for entry in home.iterdir() if entry.is_dir()) if home.is_dir() else []:
        try:
            states.append(ClusterFolder(name).live())
        except StartupError as error:
            print(f"splitserve: {error}", file=sys.stderr)
    return [state for state in states if state is not None]


def find_cluster(name: str | None) -> ClusterState:
    """The running cluster `name`, or the only one. Raises NotFound naming those that run."""
    running = running_clusters()
    found = [state for state in running if name is None or state.name == name]
    if len(found) == 1:
        return found[0]
    names = ", ".join(state.name for state in running)
    if not running:
        raise NotFound("no cluster runs here; start one with `splitserve up FILE`")
    if name is None:
        raise NotFound(f"several clusters run here; name one of {names}")
    raise NotFound(f"no cluster {name!r} runs here; there are {names}")
