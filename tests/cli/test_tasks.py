"""`ah eval --tasks`: lm-evaluation-harness asks, offline, a task of a folder of one's own."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Ah = Callable[..., Any]

pytestmark = pytest.mark.slow


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with one task of two questions, whose data stand beside it."""
    rows = [{"question": f"Say {i}.", "answer": "Ahoy!", "other": "zzzz"} for i in range(2)]
    (tmp_path / "ahoy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "ahoy.yaml").write_text(
        "task: ahoy\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'ahoy.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{[answer, other]}}"\n'
        "doc_to_target: 0\n"
        "metric_list: [{metric: acc}]\n"
    )
    return folder


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the lm-eval extra is not installed")
@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_a_task_is_asked_of_base_and_version_and_kept(
    ah: Ah, adapter_factory: Any, tiny_base: Path, task: Path
) -> None:
    assert ah("publish", adapter_factory(), "--name", "acme/ahoy").code == 0
    asked = ("--tasks", "ahoy", "--include-path", task, "--base", tiny_base)
    done = ah("eval", "acme/ahoy@1", *asked, "--json")
    assert done.code == 0, done.err
    assert done.json["tasks"] == ["ahoy"]
    assert set(done.json["scores"]) == {"base", "acme/ahoy@1"}
    assert all(0 <= metrics["ahoy.acc"] <= 1 for metrics in done.json["scores"].values())
    (kept,) = ah("show", "acme/ahoy", "--json").json["evaluations"]
    assert (kept["suite"], kept["metrics"]) == ("ahoy", done.json["scores"]["acme/ahoy@1"])
    assert kept["details"]["others"]["base"] == done.json["scores"]["base"]

    wrong = ah("eval", "acme/ahoy@1", "--tasks", "no_such_task", "--include-path", task, "--base", tiny_base)
    assert (wrong.code, "there is no task 'no_such_task'" in wrong.err) == (2, True)


def test_what_cannot_be_right_is_said_at_once(ah: Ah, adapter_factory: Any, tiny_base: Path, task: Path) -> None:
    adapter = adapter_factory()
    for words, what in (
        ((), "an evaluation needs rows or tasks"),
        (("--tasks", "ahoy", "--data", "x.jsonl"), "are two evaluations"),
        (("--tasks", "ahoy", "--score", "json"), "--score has no effect on tasks"),
        (("--data", "x.jsonl", "--num-fewshot", 2), "--num-fewshot has no effect on rows"),
    ):
        done = ah("eval", adapter, "--base", tiny_base, *words)
        assert (done.code, what in done.err) == (2, True), (words, done.err)


def test_a_missing_harness_is_named_with_the_command(
    ah: Ah, adapter_factory: Any, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    done = ah("eval", adapter_factory(), "--tasks", "gsm8k", "--base", tiny_base)
    assert done.code == 2
    assert 'pip install "adapterhub[lm-eval]"' in done.err
