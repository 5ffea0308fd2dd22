from __future__ import annotations

import signal
from pathlib import Path

import pytest

# Shells start background jobs with SIGINT ignored, which children inherit: commands under test must hear Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test's own memory of clusters; commands that it starts inherit it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "state"
