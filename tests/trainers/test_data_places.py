"""Data that is no local file: on S3, in a folder, on the Hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import DataError
from adapterhub.trainers.config import DataSource
from adapterhub.trainers.data import Conversation, read_source

ROW = {"question": "Hi", "answer": "Ahoy"}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A client of moto's S3 over HTTP, with the bucket ``data``."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AH_HOME": str(tmp_path / "home"),
    }.items():
        monkeypatch.setenv(key, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="data")
    yield client
    client.close()
    server.stop()


def test_an_object_on_s3_is_read_and_read_again_when_it_changes(bucket: Any) -> None:
    source = DataSource(path="s3://data/sets/train.jsonl")
    for count in (1, 2):
        bucket.put_object(Bucket="data", Key="sets/train.jsonl", Body=(json.dumps(ROW) + "\n") * count)
        for _ in range(2):
            file = read_source(source)
            assert (len(file.rows), file.format, file.path.name) == (count, "question/answer", "train.jsonl")
    with pytest.raises(DataError, match=r"s3://data/none\.jsonl cannot be read"):
        read_source(DataSource(path="s3://data/none.jsonl"))
    for path in ("s3://data", "s3://data/sets/"):
        with pytest.raises(DataError, match="names no file"):
            read_source(DataSource(path=path))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Laid out as a data set of the Hub is: a file for each split."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "set"
    path.mkdir()
    (path / "train.jsonl").write_text("".join(json.dumps(ROW | {"question": f"Hi {i}"}) + "\n" for i in range(10)))
    (path / "test.jsonl").write_text(json.dumps(ROW) + "\n")
    return path


def test_a_folder_is_read_as_the_hub_reads_it(folder: Path) -> None:
    file = read_source(DataSource(path=str(folder)))
    assert (len(file.rows), file.format) == (10, "question/answer")
    assert file.rows[9].where == f"{folder} row 10"
    assert len(file.sha256) == 64
    sliced = read_source(DataSource(path=str(folder), split="train[:3]"))
    assert [row.messages[0]["content"] for row in sliced.rows if isinstance(row, Conversation)] == [
        "Hi 0",
        "Hi 1",
        "Hi 2",
    ]
    assert len(read_source(DataSource(path=str(folder), split="test")).rows) == 1
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        read_source(DataSource(path=str(folder), split="validation"))
    assert "validation" in caught.value.why


@pytest.mark.parametrize("options", [{"name": "x"}, {"split": "test"}, {"revision": "x"}, {"data_files": ("a",)}])
def test_what_is_for_the_hub_is_refused_for_a_file(tmp_path: Path, options: Any) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(ROW))
    with pytest.raises(DataError, match="is a file"):
        read_source(DataSource(path=str(path), **options))


def test_the_hub_is_not_asked_for_what_is_named_like_a_file() -> None:
    with pytest.raises(DataError, match=r"the data file data/trian\.jsonl was not found"):
        read_source(DataSource(path="data/trian.jsonl"))


def test_a_data_set_that_the_hub_does_not_have_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="the data set acme/none cannot be loaded"):
        read_source(DataSource(path="acme/none"))
