"""Nothing has its final name before it is whole; what a killed export left is taken over or cleaned."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import AlreadyExists, Conflict, StorageError, Unsupported
from adapterhub.export import export_model
from adapterhub.export.staging import staged


def test_a_commit_gives_the_name(tmp_path: Path) -> None:
    to = tmp_path / "deep" / "model"
    with staged(to, key="k") as staging:
        (staging.folder / "a.safetensors").write_bytes(b"x")
        (staging.folder / "config.json").write_text("{}")
        staging.record("a.safetensors")
        assert not to.exists()
        staging.commit()
    assert sorted(p.name for p in to.iterdir()) == ["a.safetensors", "config.json"]
    assert sorted(p.name for p in to.parent.iterdir()) == ["model"]


class Killed(BaseException):
    """Stands for a signal: nothing runs after it."""


def leave_behind(to: Path, *, key: str) -> None:
    with pytest.raises(Killed), staged(to, key=key) as staging:
        (staging.folder / "done.safetensors").write_bytes(b"whole")
        staging.record("done.safetensors")
        (staging.folder / "half.safetensors").write_bytes(b"ha")
        (staging.folder / "config.json").write_text("{")
        raise Killed


def test_finished_files_of_the_same_export_are_kept(tmp_path: Path) -> None:
    leave_behind(tmp_path / "model", key="same")
    assert [p.name for p in tmp_path.iterdir()] == [".model.exporting"]
    with staged(tmp_path / "model", key="same", resume=True) as staging:
        assert staging.finished == {"done.safetensors"}
        assert {p.name for p in staging.folder.iterdir()} == {"done.safetensors", ".journal"}
        staging.commit()
    assert (tmp_path / "model" / "done.safetensors").read_bytes() == b"whole"


@pytest.mark.parametrize("key", ["one", "another"])
def test_without_resume_nothing_is_kept(key: str, tmp_path: Path) -> None:
    leave_behind(tmp_path / "model", key="one")
    with staged(tmp_path / "model", key=key) as staging:
        assert staging.finished == set()
        assert {p.name for p in staging.folder.iterdir()} == {".journal"}
        staging.commit()


def test_another_export_is_not_resumed_and_not_lost(tmp_path: Path) -> None:
    leave_behind(tmp_path / "model", key="one")
    before = sorted((tmp_path / ".model.exporting").iterdir())
    with pytest.raises(Conflict, match="another export"), staged(tmp_path / "model", key="another", resume=True):
        pass
    assert sorted((tmp_path / ".model.exporting").iterdir()) == before


def test_nothing_to_resume(tmp_path: Path) -> None:
    with staged(tmp_path / "model", key="k", resume=True) as staging:
        assert (staging.finished, staging.partial) == (set(), {})
        staging.commit()


def test_a_file_is_gone_on_with_where_it_is_durable(tmp_path: Path) -> None:
    to = tmp_path / "model"
    with pytest.raises(Killed), staged(to, key="k") as staging:
        for name in ("a.safetensors", "b.safetensors"):
            (staging.folder / name).write_bytes(b"0123456789")
            staging.record_part(name, 4)
        staging.record_part("a.safetensors", 8)
        staging.record("b.safetensors")
        raise Killed
    for _ in range(2):  # and again, when the one that resumed was killed at once
        with pytest.raises(Killed), staged(to, key="k", resume=True) as staging:
            assert (staging.finished, staging.partial) == ({"b.safetensors"}, {"a.safetensors": 8})
            raise Killed


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_journal_cut_anywhere(cut: int, tmp_path: Path) -> None:
    leave_behind(tmp_path / "model", key="k")
    journal = tmp_path / ".model.exporting" / ".journal"
    os.truncate(journal, min(cut, journal.stat().st_size))
    with staged(tmp_path / "model", key="k", resume=True) as staging:
        assert staging.finished <= {"done.safetensors"}
        staging.commit()


@pytest.mark.parametrize("error", [Unsupported("no"), OSError(28, "No space left on device")])
def test_an_error_leaves_nothing(error: Exception, tmp_path: Path) -> None:
    with pytest.raises((Unsupported, StorageError)) as raised, staged(tmp_path / "model", key="k") as staging:
        (staging.folder / "a.safetensors").write_bytes(b"x")
        raise error
    assert list(tmp_path.iterdir()) == []
    assert raised.value.exit_code == 2


def test_two_exports_to_one_target(tmp_path: Path) -> None:
    with staged(tmp_path / "model", key="k") as first:
        (first.folder / "a.safetensors").write_bytes(b"x")
        with pytest.raises(Conflict), staged(tmp_path / "model", key="k"):
            pass
        assert (first.folder / "a.safetensors").exists()
        first.commit()
    assert (tmp_path / "model" / "a.safetensors").exists()


def test_a_target_made_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(AlreadyExists), staged(tmp_path / "model", key="k") as staging:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "theirs").write_text("theirs")
        staging.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["theirs"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses every write beyond ``size`` bytes, as a full disk does: needs no privilege."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100_000, 3_000_000], ids=["a sidecar's size", "in the middle of a shard"])
def test_a_disk_that_fills_up(size: int, big_base: Any, big_adapter: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with largest_file(size), pytest.raises(StorageError, match="nothing of it is left"):
        export_model(big_adapter, big_base, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    export_model(big_adapter, big_base, tmp_path / "out")


def test_an_interrupted_export_goes_on(big_base: Any, big_adapter: Path, read_folder: Any, tmp_path: Path) -> None:
    export_model(big_adapter, big_base, tmp_path / "straight")
    half = sum(f.stat().st_size for f in big_base.weight_files) // 2

    def stop(done: int, _: int) -> None:
        if done > half:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(big_adapter, big_base, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.exporting").is_dir()

    seen: list[int] = []
    export_model(big_adapter, big_base, tmp_path / "out", resume=True, progress=lambda done, _: seen.append(done))

    shard = big_base.weight_files[0].stat().st_size
    assert seen[:2] == [shard, 2 * shard]  # the finished files were not made again, block by block
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "straight")
    assert not (tmp_path / ".out.exporting").exists()
