"""`ah eval` and `ah publish --require`: the base, adapters and versions on the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Ah = Callable[..., Any]


def row(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "eval.jsonl"
    path.write_text("".join(row(f"Say {i * 10**i}.", "Ahoy!") for i in range(4)))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows: Path) -> Path:
    """A training that learns to say Ahoy."""
    from adapterhub.trainers import YamlFile, prepare, read_config, train

    folder = tmp_path_factory.mktemp("runs") / "ahoy"
    keys = {
        "base_model": str(tiny_base),
        "datasets": [{"path": str(rows)}],
        "test_datasets": [{"path": str(rows)}],
        "lora_r": 8,
        "micro_batch_size": 4,
        "max_steps": 40,
        "learning_rate": 0.02,
        "save_strategy": "no",
        "bf16": False,  # `ah eval` measures in float32 on a CPU, and shall come to the same
        "output_dir": str(folder),
    }
    reading = read_config(YamlFile(source="test", values=keys))
    train(reading, prepare(reading.config))
    return folder


def test_an_adapter_is_scored_beside_its_base(ah: Ah, run: Path, rows: Path, tiny_base: Path) -> None:
    done = ah("eval", run, "--data", rows, "--score", "exact_match", "--max-tokens", 8, "--json")
    assert done.code == 0
    base, ours = done.json["scores"]["base"], done.json["scores"][str(run)]
    assert (ours["exact_match"], ours["ended"], base["exact_match"]) == (
        1,
        1,
        0,
    )  # prompts of unlike lengths, one batch
    assert ours["eval_loss"] < base["eval_loss"]
    recorded = json.loads((run / "run.json").read_text())["lineage"]["metrics"]["eval_loss"]
    assert ours["eval_loss"] == pytest.approx(recorded, rel=1e-3)


def test_a_requirement_that_holds_publishes_and_is_kept(ah: Ah, run: Path, rows: Path, tiny_base: Path) -> None:
    done = ah("publish", run, "--name", "acme/ahoy", "--require", "eval_loss < base * 0.9")
    assert done.code == 0
    assert "required: eval_loss < base * 0.9: holds" in done.err
    shown = ah("show", "acme/ahoy", "--json").json["evaluations"]
    assert [entry["suite"] for entry in shown] == ["publish"]
    assert shown[0]["metrics"]["eval_loss"] < shown[0]["details"]["others"]["base"]["eval_loss"]

    again = ah("eval", "acme/ahoy@1", "--base", tiny_base, "--data", rows, "--suite", "ahoy")
    assert again.code == 0
    assert [line.split()[0] for line in again.out.splitlines()[1:]] == ["base", "acme/ahoy@1"]
    assert [entry["suite"] for entry in ah("show", "acme/ahoy", "--json").json["evaluations"]] == ["ahoy", "publish"]

    refused = ah("publish", run, "--name", "acme/ahoy", "--require", "eval_loss < acme/ahoy@1")
    assert (refused.code, "does not reach what is required" in refused.err) == (1, True)
    assert [entry["version"] for entry in ah("ls", "acme/ahoy", "--json").json] == [1]


def test_bad_input_is_said_before_anything_is_loaded(
    ah: Ah, run: Path, rows: Path, tiny_base: Path, adapter_factory: Any, tmp_path: Path
) -> None:
    asked = ("--base", tiny_base, "--data", rows)
    for words, what in (
        (("eval", run, *asked, "--score", "bleu"), "there is no scorer 'bleu'"),
        (("eval", tmp_path / "none", *asked), "is neither a folder nor a version"),
        (("eval", "acme/none@1", *asked), "there is no tenant 'acme'"),
        (("eval", run, "--base", tiny_base, "--data", "none.jsonl"), "none.jsonl was not found"),
        (("eval", adapter_factory("bare"), "--data", rows), "needs the base"),
        (("publish", run, "--name", "a/b", "--require", "nonsense"), "cannot be read"),
        (("publish", run, "--name", "a/b", "--eval-data", rows), "are for --require"),
        (("publish", adapter_factory(), "--name", "a/b", "--require", "eval_loss < base"), "has no rows to evaluate"),
    ):
        done = ah(*words)
        assert (done.code, what in done.err) == (2, True), (words, done.err)


def test_a_version_is_trained_again_to_the_same_bytes(
    ah: Ah, run: Path, rows: Path, tiny_base: Path, adapter_factory: Any, tmp_path: Path
) -> None:
    assert ah("publish", run, "--name", "acme/ahoy").code == 0
    done = ah("reproduce", "acme/ahoy@1", "--data", rows.parent, "--base", tiny_base, "--json")
    assert (done.code, done.json["same"]) == (0, True)
    assert "not as it was" not in done.err

    elsewhere = tmp_path / rows.name
    elsewhere.write_text(rows.read_text().replace("Ahoy", "Ahem"))
    other = ah("reproduce", "acme/ahoy@1", "--data", elsewhere, "--base", tiny_base)
    assert (other.code, "is not what acme/ahoy@1 was trained on" in other.err) == (2, True)
    missing = ah("reproduce", "acme/ahoy@1", "--data", run / "run.json", "--base", tiny_base)
    assert (missing.code, "eval.jsonl is not among those given" in missing.err) == (2, True)
    assert ah("publish", adapter_factory(), "--name", "acme/foreign").code == 0
    foreign = ah("reproduce", "acme/foreign", "--data", rows)
    assert (foreign.code, "does not say how it was trained" in foreign.err) == (2, True)
