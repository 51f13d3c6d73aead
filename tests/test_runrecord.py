from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterhub.errors import AdapterError, InvalidName, Unsupported
from adapterhub.manifest import BaseFingerprint, Lineage
from adapterhub.refs import AdapterName
from adapterhub.runrecord import RunRecord

RECORD = RunRecord(
    base=BaseFingerprint("tiny", "1" * 64, "2" * 64, "3" * 64, "F32", 10),
    lineage=Lineage(method="sft", data_sha256=("a" * 64,), seed=7, metrics={"eval_loss": 1.5}),
    name=AdapterName("acme", "support"),
    channel="canary",
    labels={"team": "billing"},
    chat_template_sha256="b" * 64,
)


def test_what_training_wrote_is_read_back(tmp_path: Path) -> None:
    RECORD.write(tmp_path / "run.json")
    assert RunRecord.read(tmp_path / "run.json") == RECORD
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_run_without_a_name_has_none(tmp_path: Path) -> None:
    RunRecord(base=RECORD.base).write(tmp_path / "run.json")
    read = RunRecord.read(tmp_path / "run.json")
    assert read.name is None
    assert read.channel is None
    assert read.lineage == Lineage()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "base": {}}', '{"format": "x"}'])
def test_another_file_of_that_name_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(AdapterError, match="not the record of a run"):
        RunRecord.read(tmp_path / "run.json")


def test_a_newer_record_and_a_wrong_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(RECORD.to_json() | {"format": 2}))
    with pytest.raises(Unsupported):
        RunRecord.read(path)
    path.write_text(json.dumps(RECORD.to_json() | {"name": "../../etc"}))
    with pytest.raises(InvalidName):
        RunRecord.read(path)
