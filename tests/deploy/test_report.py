from __future__ import annotations

import io

from rich.console import Console

from splitserve.deploy.report import status_table
from splitserve.deploy.status import ClusterStatus, UnitStatus


def test_the_status_of_a_cluster_shows_brackets_as_they_are() -> None:
    endpoint, reason = "[fe80::1]:50061", "prefill/0/0: /models/[/]x: no such file"
    unit = UnitStatus("router/0", "router", "failed", (), 3, reason, endpoint, True)
    console = Console(file=(shown := io.StringIO()), width=200)
    console.print(status_table(ClusterStatus("t", "shm", units=(unit,))))
    assert endpoint in shown.getvalue()
    assert reason in shown.getvalue()
