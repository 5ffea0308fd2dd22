"""Structured logs: one JSON object a line, one file a worker.

A line has `time` (UTC, ISO 8601), `level`, `worker`, `message` and whatever `extra` names: a line about a request
has its `request_id`, as in `logger.info("...", extra={"request_id": request_id})`. An exception adds `traceback`.
What the process prints itself (a native crash's last words) lands in the same file as plain text.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import logging.handlers
import os
import sys
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

MAX_FILE_BYTES = 16 * 2**20
KEPT_FILES = 2
HEAD = ("time", "level", "worker", "message", "traceback")  # what `render` places; the rest follows as name=value


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON line."""

    def __init__(self, worker: str) -> None:
        super().__init__()
        self._worker = worker
        # What a record has without any `extra`. Ray adds to it when it is imported.
        self._standard = frozenset(vars(logging.makeLogRecord({}))) | {"taskName"}

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "worker": self._worker,
            "message": record.getMessage(),
        }
        entry |= {name: value for name, value in vars(record).items() if name not in self._standard}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def log_path(folder: Path, worker: str) -> Path:
    """The log file of worker "pool/replica/rank"."""
    return folder / f"{worker.replace('/', '-')}.log"


def start_logging(folder: Path, worker: str, *, capture_output: bool) -> Path:
    """Send this process's logs to the worker's file and return its path.

    With `capture_output`, stdout, stderr and a native crash's stack go there too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = log_path(folder, worker)
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=MAX_FILE_BYTES, backupCount=KEPT_FILES)
    handler.setFormatter(JsonFormatter(worker))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    if capture_output:
        _capture_output(path)
    return path


def _capture_output(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable(file=2)


def tail(path: Path, count: int) -> list[str]:
    """The last `count` lines of a log file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as stream:
        return [line.rstrip("\n") for line in deque(stream, maxlen=count)]


def render(line: str) -> str:
    """A log line as people read it; text that is not one of our entries stays as it is."""
    try:
        entry = json.loads(line)
        head = f"{entry['time'][11:23]} {entry['level']:<7} {entry['worker']:<13} {entry['message']}"
        extra = "".join(f"  {name}={value}" for name, value in entry.items() if name not in HEAD)
        return f"{head}{extra}" + (f"\n{entry['traceback']}" if "traceback" in entry else "")
    except (ValueError, TypeError, KeyError):
        return line


def _time(line: str) -> str:
    """When a line was logged; "" for text between entries."""
    try:
        return str(json.loads(line)["time"])
    except (ValueError, TypeError, KeyError):
        return ""


def merge(tails: list[list[str]], count: int) -> list[str]:
    """The last `count` lines of several tails by time; plain text stays behind the entry that it follows."""
    keyed: list[tuple[str, str]] = []
    for lines in tails:
        time = ""
        for line in lines:
            time = _time(line) or time
            keyed.append((time, line))
    return [line for _, line in sorted(keyed, key=lambda pair: pair[0])][-count:]
