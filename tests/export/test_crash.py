"""SIGKILL at random moments: the target is whole or not there, and the next export makes the same bytes."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import pytest

from adapterhub.base import find_base
from adapterhub.errors import AlreadyExists, Conflict
from adapterhub.export import export_model, verify


@pytest.mark.slow
def test_killed_at_any_moment(big_base: Any, big_adapter: Path, read_folder: Any, tmp_path: Path) -> None:
    export_model(big_adapter, big_base, tmp_path / "straight")
    wanted = read_folder(tmp_path / "straight")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "adapterhub.export.model"])
    to = tmp_path / "out"

    def start(target: Path) -> Any:
        child = processes.Process(target=export_model, args=(big_adapter, big_base, target), kwargs={"resume": True})
        child.start()
        return child

    start(tmp_path / "warm").join(120)  # the fork server imports torch once
    began = time.monotonic()
    start(tmp_path / "timed").join(120)
    whole = time.monotonic() - began
    assert read_folder(tmp_path / "timed") == wanted

    chance = random.Random(0)
    killed = completed = 0
    for _ in range(12):
        child = start(to)
        child.join(chance.uniform(0, 1.1 * whole))  # a moment anywhere in an export
        child.kill()
        child.join(60)
        killed += child.exitcode == -9
        if to.exists():
            verify(to)  # never half a model under the final name
            completed += 1
            to.rename(tmp_path / f"whole-{completed}")
    assert killed >= 3

    export_model(big_adapter, big_base, to, resume=True)

    assert read_folder(to) == wanted
    assert not (tmp_path / ".out.exporting").exists()
    with pytest.raises(AlreadyExists):
        export_model(big_adapter, big_base, to)


@pytest.mark.slow
def test_many_exports_to_one_target(big_base: Any, big_adapter: Path, read_folder: Any, tmp_path: Path) -> None:
    """One makes it; the others are told why not, and take nothing from it."""
    export_model(big_adapter, big_base, tmp_path / "straight")
    processes = multiprocessing.get_context("forkserver")
    with processes.Pool(4) as pool:
        told = pool.starmap(try_export, [(big_adapter, big_base.path, tmp_path / "out")] * 8, chunksize=1)
    assert told.count("made") == 1
    assert set(told) <= {"made", "Conflict", "AlreadyExists"}
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "straight")
    assert not (tmp_path / ".out.exporting").exists()


def try_export(adapter: Path, base: Path, to: Path) -> str:
    try:
        export_model(adapter, find_base(str(base)), to)
    except Conflict as error:  # AlreadyExists is one
        return type(error).__name__
    return "made"
