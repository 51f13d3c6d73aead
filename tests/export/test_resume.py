"""A killed export goes on where its journal says that the bytes are durable, inside a file too, to the same bytes."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import Conflict, StorageError
from adapterhub.export import export_model, verify
from adapterhub.export.layout import BLOCK


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes in the journal after every block: what 128 MB are to a real model."""
    monkeypatch.setattr("adapterhub.export.merge._SYNC", 0)


@pytest.fixture
def at_once(often: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each note is durable before the next block: how many there are does not depend on how busy the disk is."""
    monkeypatch.setattr("adapterhub.export.merge.ThreadPoolExecutor", AtOnce)


class AtOnce(ThreadPoolExecutor):
    """Runs what it is given before it returns."""

    def submit(self, work: Any, *arguments: Any, **named: Any) -> Future[Any]:
        future = super().submit(work, *arguments, **named)
        future.result()
        return future


def interrupt(adapter: Path, base: Any, to: Path, *, after: float, **options: Any) -> None:
    def stop(done: int, total: int) -> None:
        if done > after * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(adapter, base, to, certificate=False, progress=stop, **options)
    assert not to.exists()


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "bfloat16"}, {"max_shard_size": 10**9}, {"quantize": "w4a16"}, {"quantize": "w8a8"}],
    ids=["same", "cast", "one", "w4a16", "w8a8"],
)
@pytest.mark.parametrize("after", [0.0, 0.2, 0.5, 0.9])
def test_the_same_bytes(
    after: float, options: dict[str, Any], big_base: Any, big_adapter: Path, read_folder: Any, tmp_path: Path
) -> None:
    export_model(big_adapter, big_base, tmp_path / "straight", certificate=False, **options)
    interrupt(big_adapter, big_base, tmp_path / "out", after=after, **options)
    interrupt(big_adapter, big_base, tmp_path / "out", after=0.95, resume=True, **options)
    export_model(big_adapter, big_base, tmp_path / "out", certificate=False, resume=True, **options)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "straight")


@pytest.mark.usefixtures("at_once")
def test_what_is_durable_in_a_file_is_not_made_again(big_base: Any, big_adapter: Path, tmp_path: Path) -> None:
    one = {"max_shard_size": 10**9}
    interrupt(big_adapter, big_base, tmp_path / "out", after=0.8, **one)
    first: list[int] = []
    export_model(
        big_adapter, big_base, tmp_path / "out", resume=True, progress=lambda done, _: first.append(done), **one
    )
    assert first[0] > 4 * BLOCK  # tensors of half a block: the first that is made again is not the file's first
    assert verify(tmp_path / "out")


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("change", ["adapter", "dtype", "shards", "base"])
def test_what_was_left_of_another_export(
    change: str, big_base: Any, big_adapter: Path, adapter_factory: Any, read_folder: Any, tmp_path: Path
) -> None:
    interrupt(big_adapter, big_base, tmp_path / "out", after=0.5)
    options: dict[str, Any] = {"shards": {"max_shard_size": 10**9}, "dtype": {"dtype": "float16"}}.get(change, {})
    if change == "adapter":
        config = big_adapter / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    if change == "base":
        os.utime(big_base.weight_files[-1], ns=(1, 1))
    with pytest.raises(Conflict, match="another export"):
        export_model(big_adapter, big_base, tmp_path / "out", resume=True, **options)
    export_model(big_adapter, big_base, tmp_path / "out", **options)  # and without --resume it begins anew
    export_model(big_adapter, big_base, tmp_path / "straight", **options)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "straight")


def test_a_target_on_another_file_system(big_base: Any, big_adapter: Path, read_folder: Any, tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    export_model(big_adapter, big_base, tmp_path / "here")
    with tempfile.TemporaryDirectory(dir=shared) as there:
        export_model(big_adapter, big_base, Path(there) / "deep" / "out", link=True)
        assert read_folder(Path(there) / "deep" / "out") == read_folder(tmp_path / "here")
        assert [p.name for p in Path(there, "deep").iterdir()] == ["out"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="Linux's /proc takes no new folders, not even root's")
def test_a_target_that_takes_no_folders(big_base: Any, big_adapter: Path) -> None:
    with pytest.raises(StorageError):
        export_model(big_adapter, big_base, Path("/proc/adapterhub-out"))


@pytest.mark.parametrize("kept", [0, 7, 100, 4000])
def test_a_shard_that_is_cut_off_while_it_is_read(kept: int, big_base: Any, big_adapter: Path, tmp_path: Path) -> None:
    """The plan read whole headers; then somebody fetches the base anew."""
    before = {path.name for path in tmp_path.iterdir()}

    def cut(done: int, _: int) -> None:
        os.truncate(big_base.weight_files[-1], kept)

    with pytest.raises(StorageError, match="shorter"):
        export_model(big_adapter, big_base, tmp_path / "out", progress=cut)
    assert {path.name for path in tmp_path.iterdir()} == before
