"""docs/observability.md lists exactly the metrics that there are."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from splitserve.router.admission import Admission
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.metrics import RouterMetrics
from tests.router.routers import running_router
from tests.router.test_metrics import scrape

DOC = Path(__file__).parents[2] / "docs" / "observability.md"
SUFFIXES = {"counter": "_total", "info": "_info"}
ROW = re.compile(r"^\| `(splitserve_\w+)` \| (\w+) \| ([\w, ]*) \| (.+) \|$", re.MULTILINE)


def test_names_types_and_meanings_are_those_of_the_code() -> None:
    documented = [(name, kind, meaning) for name, kind, _, meaning in ROW.findall(DOC.read_text())]
    there = [
        (family.name + SUFFIXES.get(family.type, ""), family.type, family.documentation)
        for family in RouterMetrics(Admission(1, 1), [], lambda: True).registry.collect()
        if family.name.startswith("splitserve_")
    ]
    assert sorted(documented) == sorted(there)


def test_labels_are_those_of_a_scrape() -> None:
    async def scenario() -> None:
        async with running_router(cluster) as (service, client):
            await client.generate([5, 6, 7]).result()
            await asyncio.sleep(1.2)  # the next stats of engines
            found = await scrape(service)
        labels = {
            re.sub("_(bucket|sum|count)$", "", sample.name): sorted(sample.labels.keys() - {"le"})
            for family in found.families.values()
            for sample in family.samples
        }
        for name, _, documented, _ in ROW.findall(DOC.read_text()):
            assert sorted(filter(None, documented.split(", "))) == labels[name], name

    with FakeCluster() as cluster:
        asyncio.run(scenario())
