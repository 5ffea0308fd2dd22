from __future__ import annotations

import json
import os
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from splitserve.cluster.errors import NotFound, StartupError
from splitserve.cluster.segment_files import FOLDER
from splitserve.deploy.cluster_state import (
    ClusterFolder,
    ClusterState,
    LocalRay,
    find_cluster,
    running_clusters,
    write_atomically,
)
from splitserve.deploy.processes import Process
from splitserve.kv_transfer.shm import ShmSegment
from tests.deploy.clusters import NO_PROCESS

ME = Process.of(os.getpid())


def joined(name: str) -> ClusterState:
    return ClusterState(name, "10.0.0.1:6379", "/topology.yaml", ("10.0.0.1:50061",), None)


def local(name: str, owner: Process, folder: Path) -> ClusterState:
    return replace(joined(name), ray=LocalRay(owner, str(folder)))


def write(state: ClusterState) -> ClusterFolder:
    folder = ClusterFolder(state.name)
    folder.make()
    folder.write(state)
    return folder


def test_states_survive_the_file(tmp_path: Path) -> None:
    assert ME is not None
    for state in (joined("a"), local("b", ME, tmp_path)):
        folder = write(state)
        assert folder.read() == state
        assert folder.live() == state
        assert stat.S_IMODE((folder.path / "cluster.json").stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_a_state_from_before_boot_ids_is_read(tmp_path: Path) -> None:
    assert ME is not None
    folder = write(state := local("b", ME, tmp_path))
    file = folder.path / "cluster.json"
    raw = json.loads(file.read_text())
    assert raw["ray"]["owner"].pop("boot") == ME.boot
    file.write_text(json.dumps(raw))
    assert folder.live() == state


def test_what_a_dead_owner_left_is_swept(tmp_path: Path) -> None:
    assert ME is not None
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    name = f"test-{os.getpid()}-stale"
    folder = write(local(name, replace(ME, started=ME.started - 1), sockets))
    living, left = ShmSegment(name, 4096), FOLDER / f"splitserve-{name}-{NO_PROCESS}-0123abcd"
    left.touch()
    assert folder.live() is None
    assert folder.read() is None
    assert not sockets.exists()
    assert not left.exists()
    assert (FOLDER / living.name).exists(), "a cluster of that name may run with another state folder"
    living.close()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ray": 5}', "\xff"])
def test_one_file_that_cannot_be_read_hides_no_other_cluster(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(joined("a"))
    damaged = write(joined("b"))
    (damaged.path / "cluster.json").write_text(text, encoding="latin-1")
    (damaged.path.parent / "notes.txt").touch()
    assert find_cluster(None).name == "a"
    assert f"{damaged.path / 'cluster.json'}: not what this version writes" in capsys.readouterr().err
    with pytest.raises(StartupError, match="if cluster b does not run, remove it"):
        damaged.read()


def test_a_cluster_is_found_by_name_or_alone() -> None:
    with pytest.raises(NotFound, match="no cluster runs here; start one"):
        find_cluster(None)
    write(joined("one"))
    assert find_cluster(None) == find_cluster("one") == joined("one")
    with pytest.raises(NotFound, match="no cluster 'two' runs here; there are one"):
        find_cluster("two")
    write(joined("two"))
    with pytest.raises(NotFound, match="several clusters run here; name one of one, two"):
        find_cluster(None)
    assert find_cluster("two") == joined("two")
    assert [state.name for state in running_clusters()] == ["one", "two"]


def test_the_lock_makes_the_second_wait() -> None:
    folder, order = ClusterFolder("locked"), []

    def second() -> None:
        with folder.lock():
            order.append("second")

    with folder.lock():
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "\ud800")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
