"""`ah log`, `ah tree`, `ah diff`, `ah search` as they are typed, and tables in a terminal."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub.base import find_base
from adapterhub.cli.output import fitted, print_table
from adapterhub.manifest import Lineage
from adapterhub.refs import AdapterName
from adapterhub.registry import draft, open_registry

Ah = Callable[..., Any]
NAME, MERGED = AdapterName("acme", "support"), AdapterName("acme", "merged")


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, adapter_writer: Callable[..., Path]) -> list[Any]:
    folder = tmp_path_factory.mktemp("drafts")
    base = find_base(str(tiny_base))
    return [draft(adapter_writer(folder / f"{n}", base=tiny_base, seed=n, rank=4 * n), base=base) for n in (1, 2, 3)]


@pytest.fixture
def told(ah: Ah, drafts: list[Any]) -> Ah:
    """acme/support@1 and @2, which was made from it; acme/merged@1 of both; moves, a status and an evaluation."""
    registry = open_registry(str(Path(os.environ["AH_HOME"]) / "registry"))
    parents: tuple[str, ...] = ()
    for one, name, loss in zip(drafts, (NAME, NAME, MERGED), (2.0, 1.0, 1.5), strict=True):
        lineage = Lineage(method="sft" if name == NAME else "merge", parents=parents, metrics={"eval_loss": loss})
        made = replace(one, manifest=replace(one.manifest, lineage=lineage))
        record = registry.publish(made, name=name, author="ana", labels={"team": "x"} if loss == 1 else {})
        parents = (*parents, record.digest)
    registry.set_channel(NAME, "prod", {1: 100}, who="ana")
    registry.set_channel(NAME, "prod", {2: 100}, who="ben", why="shorter answers")
    registry.rollback(NAME, "prod", who="ana")
    registry.set_status(NAME, 2, "deprecated", who="ana", why="slow")
    registry.add_evaluation(NAME, 2, suite="heldout", metrics={"score": 0.5}, who="ci")
    return ah


def test_log_tells_what_happened_newest_first(told: Ah) -> None:
    found = told("log", "acme/support", "--json").json
    assert {h["what"] for h in found} == {
        "published",
        "prod → 1",
        "prod → 2",
        "prod back to 1",
        "deprecated",
        "evaluated heldout",
    }
    assert [h["what"] for h in found].count("published") == 2
    assert [h["when"] for h in found] == sorted((h["when"] for h in found), reverse=True)
    assert [h["what"] for h in found if h["channel"]] == ["prod back to 1", "prod → 2", "prod → 1"]
    printed = told("log", "acme/support", "-n", "3").out.splitlines()
    assert printed[0].split() == ["WHEN", "WHO", "VERSION", "WHAT", "WHY"]
    assert len(printed) == 4


def test_log_of_a_version_or_a_channel(told: Ah) -> None:
    second = told("log", "acme/support@2", "--json").json
    assert sorted(h["what"] for h in second) == ["deprecated", "evaluated heldout", "prod → 2", "published"]
    assert {h["why"] for h in second} == {"slow", "score 0.5", "shorter answers", "team=x"}
    moves = told("log", "acme/support@prod", "--json").json
    assert [h["what"] for h in moves] == ["prod back to 1", "prod → 2", "prod → 1"]
    for wrong in ("acme/support@9", "acme/support@staging", "acme/nothing", "no/one"):
        done = told("log", wrong)
        assert (done.code, done.out) == (2, ""), done
        assert "next: ah " in done.err


def test_tree_shows_what_was_made_from_what(told: Ah) -> None:
    assert told("tree", "acme").out.splitlines() == [
        "acme/support@1  sft  rank 4",
        "├─ acme/merged@1  merge  rank 12",
        "└─ acme/support@2  sft  rank 8  deprecated",
        "   └─ acme/merged@1  merge  rank 12",
    ]
    assert told("tree", "acme/support@2").out.splitlines()[0] == "acme/support@1  sft  rank 4"
    merged = told("tree", "acme/merged", "--json").json
    assert {v for node in merged for v in node["versions"]} == {"acme/merged@1", "acme/support@1", "acme/support@2"}
    assert [len(node["parents"]) for node in merged if node["versions"] == ["acme/merged@1"]] == [2]
    for wrong in ("nobody", "acme/nothing", "acme/support@9", "Acme"):
        assert told("tree", wrong).code == 2


def test_diff_tells_what_is_said_and_what_is_done(told: Ah) -> None:
    found = told("diff", "acme/support@1", "2", "--json").json
    assert found["versions"] == ["acme/support@1", "acme/support@2"]
    assert found["differs"]["config.r"] == [4, 8]
    assert found["differs"]["metrics.eval_loss"] == [2.0, 1.0]
    assert found["differs"]["evaluations.heldout.score"] == [None, 0.5]
    assert found["differs"]["labels.team"] == [None, "x"]
    assert "base.name" not in found["differs"]
    assert len(found["weights"]["modules"]) == 14
    assert [layer["where"] for layer in found["weights"]["layers"]] == ["model.layers.0", "model.layers.1"]
    assert found["weights"]["all"]["apart"] > found["weights"]["layers"][0]["apart"] > 0
    printed = told("diff", "acme/support@1", "acme/merged@1").out
    assert "metrics.eval_loss" in printed and "model.layers.1" in printed and "OVERLAP IN" in printed


def test_diff_without_weights_fetches_none(told: Ah) -> None:
    found = told("diff", "acme/support@1", "@2", "--no-weights", "--json").json
    assert found["differs"]["lora.rank"] == [4, 8]
    assert found["weights"] == {"all": None, "layers": [], "modules": []}
    assert not (Path(os.environ["AH_HOME"]) / "cache").exists()


def test_diff_of_the_same_and_of_what_is_not_there(told: Ah) -> None:
    assert "are the same bytes" in told("diff", "acme/support@1", "prod").out
    for wrong in ("9", "staging", "acme/nothing", "acme/support@@2", ""):
        assert told("diff", "acme/support@1", wrong).code == 2


def test_search_by_everything(told: Ah) -> None:
    def found(*words: str) -> list[str]:
        return [hit["ref"] for hit in told("search", *words, "--json").json]

    assert found() == ["acme/merged@1", "acme/support@2", "acme/support@1"]
    assert found("support", "prod") == ["acme/support@1"]
    assert found("--rank", ">=8", "--metric", "eval_loss<1.5") == ["acme/support@2"]
    assert found("--label", "team=x", "--metric", "heldout.score>0.4") == ["acme/support@2"]
    assert found("--base", "tiny", "--tenant", "acme", "merge") == ["acme/merged@1"]
    assert found("--status", "yanked") == []
    done = told("search", "nowhere")
    assert (done.code, done.out) == (0, "") and "nothing like that" in done.err
    table = told("search", "--metric", "eval_loss<1.5").out.splitlines()
    assert "EVAL_LOSS" in table[0] and len(table) == 2
    for wrong in (["--rank", "big"], ["--metric", "loss"], ["--label", "=x"], ["--status", "gone"], ["--tenant", "no"]):
        done = told("search", *wrong)
        assert (done.code, done.out) == (2, ""), done


def test_reindex_writes_a_snapshot(told: Ah) -> None:
    assert told("registry", "reindex", "--json").json == {"acme": 2}
    assert len(list((Path(os.environ["AH_HOME"]) / "registry/t/acme/idx").iterdir())) == 1
    assert [row["adapter"] for row in told("ls", "acme", "--json").json] == ["acme/merged", "acme/support"]
    assert "acme" in told("registry", "reindex", "acme").out
    for wrong in (["nobody"], ["acme", "nobody"], ["../acme"]):
        done = told("registry", "reindex", *wrong)
        assert (done.code, done.out) == (2, ""), done
    assert "has no listing snapshots" in told("registry", "reindex", "--registry", "hf://acme-models").err


@pytest.mark.parametrize(
    ("widths", "room", "fits"),
    [
        ([3, 4], 80, [3, 4]),
        ([30, 90, 5], 80, [30, 41, 5]),
        ([90, 90], 42, [20, 20]),
        ([90, 90], 5, [8, 8]),
        ([], 80, []),
    ],
)
def test_the_widest_columns_give_first(widths: list[int], room: int, fits: list[int]) -> None:
    assert fitted(widths, room) == fits


def test_tables_fit_a_terminal_and_are_whole_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    print_table(["A", "B"], [["short", "x" * 100]])
    assert "x" * 100 in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_table(["A", "B"], [["short", "x" * 100]])
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) == 30
    assert printed[1].startswith("short") and printed[1].endswith("x…")
