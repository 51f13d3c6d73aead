"""What only a folder can get wrong: leftovers, full disks, places that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub.errors import StorageError
from adapterhub.registry.local import LocalStore


def test_leftovers_of_a_killed_writer_are_no_keys(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create("a/b", b"1")
    (tmp_path / "tmp" / "leftover").write_bytes(b"half a val")
    assert store.keys("a/") == ["a/b"]
    store.create("a/c", b"2")
    assert store.folders("a/") == []


def test_nothing_is_left_in_tmp(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create("a/b", b"1")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "registry"):
        with pytest.raises(StorageError) as refused:
            LocalStore(root).create("a/b", b"1")
        assert str(root) in refused.value.what
        assert refused.value.hint
        assert LocalStore(root).keys("a/") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Permission denied"):
            LocalStore(tmp_path).create("a/b", b"1")
    finally:
        tmp_path.chmod(0o700)


LIMITED = """
import resource, sys
from pathlib import Path
from adapterhub.errors import StorageError
from adapterhub.registry.local import LocalStore

store = LocalStore(Path(sys.argv[1]))
store.create("a/small", b"1")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    store.create("a/large", bytes(5000))
except StorageError as error:
    print(error.why, "|", error.hint)
"""


def test_a_file_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=True)
    assert "File too large | " in done.stdout
    store = LocalStore(tmp_path)
    assert store.keys("a/") == ["a/small"]
    assert list((tmp_path / "tmp").iterdir()) == []
