"""What a search means."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from adapterhub.errors import UsageError
from adapterhub.refs import AdapterName
from adapterhub.registry.base import Overview, Summary, Target
from adapterhub.registry.views.query import Query, comparison, search

ONE = Summary(
    name=AdapterName("acme", "support"),
    version=1,
    digest="sha256:" + "ab" * 32,
    status="active",
    created="2026-01-01T00:00:00+00:00",
    author="ana@acme.example",
    size=1,
    rank=16,
    base="Qwen/Qwen3-0.6B",
    method="sft",
    parents=(),
    labels={"team": "x", "language": "de"},
    metrics={"eval_loss": 1.5},
    evaluations={"heldout": {"score": 0.5}},
)
TWO = replace(ONE, version=2, rank=64, base="", labels={}, metrics={}, evaluations={}, status="yanked")
SEEN = [Overview(ONE.name, (TWO, ONE), {"prod": (Target(1, ONE.digest, 90), Target(2, TWO.digest, 10))})]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (Query(), [1]),
        (Query(statuses=("active", "yanked")), [2, 1]),
        (Query(words=("SUPPORT", "ana@", "prod")), [1]),
        (Query(words=("support", "staging")), []),
        (Query(words=("team=x",)), [1]),
        (Query(base="qwen"), [1]),
        (Query(base="llama"), []),
        (Query(ranks=(comparison("16", bare="rank"),)), [1]),
        (Query(ranks=(comparison(">=17", bare="rank"),), statuses=("active", "yanked")), [2]),
        (Query(ranks=(comparison(">8", bare="rank"), comparison("rank<=16", bare="rank"))), [1]),
        (Query(metrics=(comparison("eval_loss < 1.6"),)), [1]),
        (Query(metrics=(comparison("eval_loss<1.5"),)), []),
        (Query(metrics=(comparison("eval_loss==1.5"), comparison("heldout.score>=0.5"))), [1]),
        (Query(metrics=(comparison("score>=0.5"),)), []),
        (Query(labels={"team": "x", "language": None}), [1]),
        (Query(labels={"team": "y"}), []),
        (Query(labels={"owner": None}), []),
    ],
)
def test_all_that_is_asked_for_holds(query: Query, found: list[int]) -> None:
    assert [hit.summary.version for hit in search(SEEN, query)] == found


def test_a_hit_knows_its_channels() -> None:
    assert [hit.channels for hit in search(SEEN, Query(statuses=("active", "yanked")))] == [("prod",), ("prod",)]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("eval_loss", {}),
        ("eval_loss<", {}),
        ("<1.5", {}),
        ("eval_loss<low", {}),
        ("eval_loss<nan", {}),
        ("", {"bare": "rank"}),
        ("sixteen", {"bare": "rank"}),
        ("alpha>8", {"bare": "rank"}),
        ("8<rank<16", {"bare": "rank"}),
    ],
)
def test_what_compares_nothing_is_refused(text: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as refused:
        comparison(text, **options)
    assert refused.value.hint.startswith("ah search --")
