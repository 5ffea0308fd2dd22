"""A Ray of our own on this host, and the small process that owns it.

    up, demo --- start_local_ray ---> owner (python -m splitserve.deploy.local_ray; leads a session of its own)
       |  stdin: "keep", or EOF         |--- Ray's processes, and below them all workers (same session)
       |  stdout: one line, LocalRay    `--- reaper: waits for the owner's end, however it comes, and sweeps up

The owner ends on SIGTERM, and when whoever started it goes away before having said "keep". The kernel ends most of
Ray with it; its agents would stay, so the reaper ends what is left of the session.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from typing import IO

from splitserve.cluster.errors import StartupError
from splitserve.cluster.log import tail
from splitserve.deploy.cluster_state import ClusterFolder, LocalRay, namespace, sweep, write_atomically
from splitserve.deploy.processes import Process, session_members
from splitserve.deploy.ray_environment import prepare_ray

KEEP = b"keep\n"
STOP_S = 15.0
OBJECT_STORE_BYTES = 80 * 2**20
# Ray would start a process for each CPU before there is work, and run workers at niceness 15, behind all else.
RAY_SETTINGS = {"RAY_prestart_worker_first_driver": "0", "RAY_worker_niceness": "0"}
# Below its folder Ray puts sockets with names of some 75 characters, and a socket's path must stay under 108.
MAX_FOLDER_CHARACTERS = 28


@dataclass(frozen=True)
class StartedRay:
    """A local Ray, which ends with this process unless `keep` is called."""

    ray: LocalRay
    address: str
    _stdin: IO[bytes]

    def keep(self) -> None:
        with self._stdin as stdin:
            stdin.write(KEEP)


def start_local_ray(folder: ClusterFolder, cpus: int, gpus: int) -> StartedRay:
    """Start a Ray with so many logical CPUs and GPUs. Raises StartupError with its last words if it does not start."""
    module = ("-P", "-m", "splitserve.deploy.local_ray")  # safe: nothing is imported from the working folder
    command = [sys.executable, *module, folder.name, str(cpus), str(gpus)]
    with folder.ray_log.open("wb") as log:
        owner = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
    stdin, stdout = owner.stdin, owner.stdout
    if stdin is None or stdout is None:
        raise StartupError("the local Ray's owner has no pipes")
    try:
        line = stdout.readline()
    except BaseException:
        owner.kill()
        stdout.read()  # ends when the reaper, which has stdout too, has swept up
        raise
    if not line:
        words = "\n".join(tail(folder.ray_log, 10))
        raise StartupError(f"the local Ray did not start; its last words (more in {folder.ray_log}):\n{words}")
    said = json.loads(line)
    return StartedRay(LocalRay(Process(**said["owner"]), said["folder"]), said["address"], stdin)


def stop_local_ray(folder: ClusterFolder, ray: LocalRay) -> None:
    """End a local Ray and everything in it; returns when it is gone."""
    if ray.owner.is_alive():
        os.kill(ray.owner.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while any(session_members(ray.owner)) and time.monotonic() < deadline:
        time.sleep(0.05)
    sweep(folder, ray)


def main(arguments: list[str]) -> None:
    """The owner's life. Its stdout carries the one line that `start_local_ray` reads."""
    folder, cpus, gpus = ClusterFolder(arguments[0]), int(arguments[1]), int(arguments[2])
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    local = LocalRay(_this_process(), _short_folder())
    _start_reaper(folder, local)
    started = threading.Event()
    threading.Thread(target=_end_unless_kept, args=(started,), daemon=True).start()
    write_atomically(folder.token, secrets.token_hex(32))
    address = _start_ray(folder, local, cpus, gpus)
    try:
        signal.signal(signal.SIGTERM, _exit)
        started.set()
        with answer:
            answer.write(json.dumps(asdict(local) | {"address": address}) + "\n")
        threading.Event().wait()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _stop_ray()


def _start_ray(folder: ClusterFolder, local: LocalRay, cpus: int, gpus: int) -> str:
    """Start Ray's processes from this, the main thread: they die with the thread that forked them."""
    os.environ |= RAY_SETTINGS
    prepare_ray(folder.token)
    os.environ.pop("RAY_ADDRESS", None)  # of some other Ray, which this one is not to join
    import ray

    ray.init(
        num_cpus=cpus,
        num_gpus=gpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        namespace=namespace(folder.name),
        log_to_driver=False,
        _temp_dir=f"{local.folder}/ray",  # which Ray opens to all users; the folder itself stays private
    )
    return str(ray.get_runtime_context().gcs_address)


def _stop_ray() -> None:
    """Let the workers give back what they hold, then end Ray."""
    import ray

    from splitserve.deploy import driver

    driver.shutdown()
    ray.shutdown()


def _end_unless_kept(started: threading.Event) -> None:
    """Before there are workers there is nothing to end in good order, and Ray's start hears no polite signal."""
    if sys.stdin.buffer.readline() != KEEP:
        os.kill(os.getpid(), signal.SIGTERM if started.is_set() else signal.SIGKILL)


def _start_reaper(folder: ClusterFolder, local: LocalRay) -> None:
    """Fork the reaper. Only the owner holds the pipe's other end, so end of file tells that it is gone."""
    reaper_end, owner_end = os.pipe()
    if os.fork():
        os.close(reaper_end)
        os.set_inheritable(owner_end, False)
        return
    os.close(owner_end)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.read(reaper_end, 1)
    with contextlib.suppress(OSError):
        sweep(folder, local)
    os._exit(0)


def _exit(signum: int, frame: object) -> None:
    raise SystemExit(0)


def _this_process() -> Process:
    process = Process.of(os.getpid())
    if process is None:
        raise StartupError("this host has no /proc")
    return process


def _short_folder() -> str:
    base = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="splitserve-", dir=base if len(base) <= MAX_FOLDER_CHARACTERS - 20 else "/tmp")


if __name__ == "__main__":
    main(sys.argv[1:])
