"""Dashboards and alert rules are what Grafana and Prometheus take, and ask only for what routers export."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from promql_parser import AggregateExpr, Expr, VectorSelector
from pydantic import BaseModel, ConfigDict, Field

from tests.router.test_observability_doc import DOC, ROW

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy" / "dashboards").glob("*.json"))
RULES = sorted((ROOT / "deploy" / "alerts").glob("*.yaml"))
RULE_TESTS = Path(__file__).parent / "alerts_test.yaml"
GRAFANAS = {"$__rate_interval": "1m", "$instance": ".*"}
PARTS = {"histogram": ("_bucket", "_sum", "_count")}
SCRAPERS = {"instance", "job", "le"}  # labels that the scraper adds, and that of buckets
PROMETHEUS_OWN: dict[str, set[str]] = {"up": set(), "process_cpu_seconds_total": set()}


class Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    alert: str = Field(pattern="^Splitserve[A-Za-z]+$")
    expr: str
    pending: str = Field(default="1s", alias="for")
    labels: dict[str, str]
    annotations: dict[str, str]


def rules() -> list[Rule]:
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [Rule.model_validate(rule) for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]


def expressions() -> list[str]:
    targets = [target["expr"] for panel in panels() for target in panel.get("targets", [])]
    for name, value in GRAFANAS.items():
        targets = [expression.replace(name, value) for expression in targets]
    return targets + [rule.expr for rule in rules()]


def nodes(expression: str) -> list[Expr]:
    """All parts of an expression. Raises ValueError when it is no PromQL, or its types do not fit."""
    found: list[Expr] = []
    promql_parser.walk(promql_parser.parse(expression), lambda node: found.append(node))
    return found


def exported() -> dict[str, set[str]]:
    """What a scrape has, by name, with its labels: docs/observability.md, which is held to the code."""
    return PROMETHEUS_OWN | {
        name + part: set(filter(None, labels.split(", ")))
        for name, kind, labels, _ in ROW.findall(DOC.read_text())
        for part in PARTS.get(kind, ("",))
    }


def wrong_with(expression: str) -> list[str]:
    """What an expression asks for that is not there."""
    there, found = exported(), nodes(expression)
    selectors = [node for node in found if isinstance(node, VectorSelector)]
    missing = [node.name or "" for node in selectors if node.name not in there]
    known = set[str]().union(*(there.get(node.name or "", set()) for node in selectors), SCRAPERS)
    groupings = [node.modifier.labels for node in found if isinstance(node, AggregateExpr) and node.modifier]
    matchers = [
        matcher.name
        for node in selectors
        for matcher in node.matchers.matchers
        if matcher.name not in there.get(node.name or "", set()) | SCRAPERS
    ]
    return missing + matchers + [label for labels in groupings for label in labels if label not in known]


@pytest.mark.parametrize("expression", expressions())
def test_expressions_are_promql_about_what_routers_export(expression: str) -> None:
    assert not wrong_with(expression)


@pytest.mark.parametrize(
    ("expression", "wrong"),
    [
        ("rate(splitserve_request_total[1m])", "splitserve_request_total"),
        ("splitserve_queue_seconds", "splitserve_queue_seconds"),
        ('splitserve_requests_total{status="OK"}', "status"),
        ("sum by (engin) (splitserve_kv_pages)", "engin"),
    ],
)
def test_what_is_not_there_is_noticed(expression: str, wrong: str) -> None:
    assert wrong_with(expression) == [wrong]


def test_every_alert_says_what_and_what_to_do() -> None:
    names = [rule.alert for rule in rules()]
    assert len(names) == len(set(names)) > 5
    for rule in rules():
        assert rule.labels["severity"] in ("critical", "warning")
        assert rule.annotations.keys() == {"summary", "description"}
        promql_parser.parse_duration(rule.pending)
        for label in re.findall(r"\$labels\.(\w+)", " ".join(rule.annotations.values())):
            assert label in rule.expr or label in SCRAPERS, f"{rule.alert}: its series have no label {label}"


def test_every_panel_an_alert_points_at_is_there() -> None:
    titles = {panel["title"] for panel in panels()}
    for rule in rules():
        for title in re.findall('panel "([^"]+)"', rule.annotations["description"]):
            assert any(title in known for known in titles)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_grafanas_own_types_take_all_of_a_dashboard(path: Path) -> None:
    written = json.loads(path.read_text())
    assert lost(written, json.loads(JSONEncoder().encode(Dashboard.from_json(written)))) == []


def lost(written: Any, read: Any, place: str = "") -> list[str]:
    """Where what Grafana's types read differs from what is written; they add defaults."""
    if isinstance(written, dict) and isinstance(read, dict):
        pairs = [(f"{place}/{key}", value, read.get(key)) for key, value in written.items()]
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        pairs = [(f"{place}/{index}", *pair) for index, pair in enumerate(zip(written, read, strict=True))]
    else:
        return [] if written == read else [place]
    return [one for where, ours, theirs in pairs for one in lost(ours, theirs, where)]


def test_panels_do_not_overlap_and_have_their_own_ids() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here (it comes with Prometheus)")
def test_alerts_fire_when_they_should() -> None:
    subprocess.run(["promtool", "check", "rules", *map(str, RULES)], check=True)
    subprocess.run(["promtool", "test", "rules", str(RULE_TESTS)], check=True)
