"""The seconds of a plan: from the last export on this machine, or from an assumption that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapterhub.export import last_speed, plan_export, remember, seconds
from adapterhub.export.speed import ASSUMED, Speed

GB = 10**9


def test_the_last_export_is_remembered(tmp_path: Path) -> None:
    file = tmp_path / "home" / "speed.json"
    assert last_speed(file) == ASSUMED
    assert "assumed" in ASSUMED.told()
    remember(file, size=2 * GB, merge=4.0, certificate=8.0)
    assert last_speed(file) == Speed(GB / 2, GB / 4)
    assert last_speed(file).told() == "0.50 GB/s written, 0.25 GB/s checked, as the last export here"
    remember(file, size=2 * GB, merge=2.0, certificate=0.0)  # without a certificate the old figure stays
    assert last_speed(file) == Speed(GB, GB / 4)


def test_small_exports_measure_nothing(tmp_path: Path) -> None:
    remember(tmp_path / "speed.json", size=1000, merge=0.1, certificate=0.1)
    assert not (tmp_path / "speed.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"merge": "x"}', '{"merge": 0, "certificate": 1}'])
def test_a_broken_note_counts_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "speed.json").write_text(text)
    assert last_speed(tmp_path / "speed.json") == ASSUMED


def test_seconds(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    plan = plan_export(adapter_factory(), base_factory(), tmp_path / "out")
    speed = Speed(merge=plan.bytes_written / 3, certificate=plan.bytes_written / 5)
    assert seconds(plan, speed) == pytest.approx(8)
    assert seconds(plan, speed, certificate=False) == pytest.approx(3)
