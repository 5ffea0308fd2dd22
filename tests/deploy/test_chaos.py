"""`make chaos`, with few requests: every plan strikes a real cluster, and nothing is lost."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.chaos import PLANS

REQUESTS = 48


@pytest.mark.timeout(600)
def test_no_request_is_lost_whatever_happens_to_workers() -> None:
    if subprocess.run(["unshare", "--map-root-user", "--net", "true"], check=False).returncode:
        pytest.skip("this host lets no user have a network of its own")
    command = [sys.executable, "-m", "benchmarks.chaos", "--check", "--requests", str(REQUESTS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for plan in PLANS:
        assert f"tiny-moe, {REQUESTS} requests, {plan}" in result.stdout
