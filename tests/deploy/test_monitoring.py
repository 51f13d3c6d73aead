"""The alert rules and the dashboard, against the numbers that a server really has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry

from adapterhub.serving.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "alerts.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "adapterhub.json"
OF_PROMETHEUS = {"instance", "job", "le"}
ALERTS: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
]
PANELS: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
QUERIES = [pytest.param(rule["expr"], id=rule["alert"]) for rule in ALERTS] + [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]


@pytest.fixture(scope="module")
def families() -> dict[str, set[str]]:
    """Sample name → its labels, of every family that our code has."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    found: dict[str, set[str]] = {}
    for family in vars(metrics).values():
        labels = set(getattr(family, "_labelnames", ()))
        for described in family.describe() if hasattr(family, "describe") else ():
            suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(described.type, ("",))
            found |= {described.name + suffix: labels for suffix in suffixes}
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_parses_and_asks_for_what_there_is(query: str, families: dict[str, set[str]]) -> None:
    promql_parser.parse(query)
    names = set(re.findall(r"\badapterhub_\w+", query)) | ({"up"} & set(re.findall(r"\w+", query)))
    assert names and names - {"up"} <= families.keys(), names - families.keys()
    known = OF_PROMETHEUS.union(*(families.get(name, set()) for name in names))
    labels = set(re.findall(r'(\w+)\s*(?:=~|!=|!~|=)\s*"', query))
    for group in re.findall(r"\bby \(([^)]*)\)", query):
        labels |= {label.strip() for label in group.split(",")}
    assert labels <= known, labels - known


def test_every_number_is_in_the_dashboard(families: dict[str, set[str]]) -> None:
    shown = set(re.findall(r"\badapterhub_\w+", DASHBOARD.read_text()))
    bases = {re.sub(r"_(bucket|count|sum)$", "", name) for name in shown}
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in families} == bases


def test_an_alert_says_what_to_do() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    headings = {heading.lower() for heading in re.findall(r"^### (\w+)$", page, re.MULTILINE)}
    assert {rule["alert"].lower() for rule in ALERTS} == headings
    for rule in ALERTS:
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["annotations"]["summary"] and rule["labels"]["severity"] in ("page", "ticket")


def test_every_number_is_explained(families: dict[str, set[str]]) -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    missing = {
        name for name in families if name.removesuffix("_bucket") == name and not name.endswith(("_count", "_sum"))
    }
    assert {name for name in missing if f"`{name}`" not in page} == set()
    histograms = {name.removesuffix("_bucket") for name in families if name.endswith("_bucket")}
    assert {name for name in histograms if f"`{name}`" not in page} == set()


def test_panels_do_not_lie_over_each_other() -> None:
    cells = [
        (x, y)
        for panel in PANELS
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
