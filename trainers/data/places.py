"""Where a data set is: a local file, an object on S3, a folder, or a data set of the Hub.

The first two are files, read by `files`; the last two are loaded by the ``datasets`` library, which knows their
layouts.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import DataError, MissingDependency
from adapterhub.settings import load_settings
from adapterhub.trainers.config import DataSource
from adapterhub.trainers.data.files import Container, Value, container

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".txt", ".ndjson", ".jsonlines")


@dataclass(frozen=True)
class HubRows:
    """Rows that the ``datasets`` library loads, from the Hub or from a folder."""

    path: Path
    source: DataSource
    lined = False

    def where(self, number: int) -> str:
        return f"{self.path} row {number}"

    def look(self, number: int) -> str:
        return f"look at row {number} of {self.path}"

    def sha256(self) -> None:
        """There is no one file: the rows themselves are hashed."""

    def rows(self) -> Iterator[tuple[int, Value]]:
        """All rows of the split, in order. Raises DataError: it is not there, or has no such split."""
        yield from enumerate(self._loaded(), 1)

    def _loaded(self) -> Any:
        try:
            import datasets
            from datasets.exceptions import DatasetsError
        except ImportError as error:
            raise MissingDependency(
                "data sets of the Hub need the datasets library", why=str(error), hint='pip install "adapterhub[train]"'
            ) from error
        source = self.source
        files = list(source.data_files) or None
        try:
            return datasets.load_dataset(
                str(self.path), source.name, data_files=files, split=source.split or "train", revision=source.revision
            )
        except (DatasetsError, OSError, ValueError) as error:  # requests' errors are OSErrors
            raise DataError(
                f"the data set {self.path} cannot be loaded",
                why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
                hint="check path, name, split and revision; `hf auth login` where it is private",
            ) from error


def find(source: DataSource, beside: Path | None) -> Container | HubRows:
    """Looks beside the config, in the working directory, then on the Hub. Raises DataError."""
    if source.path.startswith("s3://"):
        return _file(_downloaded(source.path), source)
    here = Path(source.path).expanduser()
    choices = [here] if here.is_absolute() or beside is None else [beside / here, here]
    for path in choices:
        if path.is_file():
            return _file(path, source)
        if path.is_dir():
            if not any(path.iterdir()):
                raise DataError(f"the folder {path} is empty", hint="name a data file, or a folder of them")
            return HubRows(path, source)
    if _HUB_ID.fullmatch(source.path) and not source.path.lower().endswith(_DATA_FILES):
        return HubRows(here, source)
    raise DataError(
        f"the data file {source.path} was not found",
        why="looked for " + " and ".join(str(path) for path in choices),
        hint="check datasets: path, or name it with --data",
    )


def _file(path: Path, source: DataSource) -> Container:
    for key, value in (("name", source.name), ("revision", source.revision), ("data_files", source.data_files)):
        if value:
            raise DataError(f"{path} is a file", why=f"{key} is for data sets of the Hub", hint=f"take {key} out")
    if source.split not in (None, "train"):
        raise DataError(
            f"{path} is a file", why=f"it has no split {source.split}", hint="take split out, or val_set_size"
        )
    return container(path, source.ds_type)


def _downloaded(url: str) -> Path:
    """A local copy, made once for each state of the object (its ETag)."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket or not key or key.endswith("/"):
        raise DataError(f"{url} names no file", hint="write s3://bucket/path/train.jsonl")
    try:
        client = boto3.client("s3")
        etag = client.head_object(Bucket=bucket, Key=key)["ETag"]
        state = hashlib.sha256(f"{url} {etag}".encode()).hexdigest()[:32]
        path = load_settings().home / "data" / state / key.rsplit("/", 1)[-1]
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{os.getpid()}.part")
            client.download_file(bucket, key, str(part))
            part.replace(path)
        return path
    except (BotoCoreError, ClientError, OSError) as error:
        raise DataError(
            f"{url} cannot be read",
            why=str(error),
            hint="check the address, and who you are: aws sts get-caller-identity",
        ) from error
