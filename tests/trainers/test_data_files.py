"""The files that rows come in, and what is wrong with them."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import DataError
from adapterhub.trainers.config import DataSource
from adapterhub.trainers.data import Conversation, DataFile, files, read_source

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}
CHAT = {"messages": [USER, ANSWER]}
BAD = {"messages": []}


def read(path: Path, *, skip_bad_rows: int = 0, **options: Any) -> DataFile:
    return read_source(DataSource(path=str(path), **options), skip_bad_rows=skip_bad_rows)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def contents(file: DataFile) -> list[list[str]]:
    return [[m["content"] for m in row.messages] for row in file.rows if isinstance(row, Conversation)]


def test_a_json_array_is_rows(tmp_path: Path) -> None:
    for i, text in enumerate([json.dumps([CHAT, CHAT]), json.dumps([CHAT, CHAT], indent=2), "\ufeff[]"]):
        path = write(tmp_path / f"{i}.json", text)
        if i < 2:
            assert contents(read(path)) == [["Hi", "Ahoy"]] * 2
            assert read(path).rows[1].where == f"{path} row 2"
    with pytest.raises(DataError, match="is empty"):
        read(path)
    pretty = write(tmp_path / "pretty.jsonl", json.dumps([CHAT], indent=2))  # by another name, as people have it
    assert contents(read(pretty)) == [["Hi", "Ahoy"]]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (json.dumps([CHAT, BAD], indent=1), "rows.json row 2: messages is empty"),
        ("[\n" + json.dumps(CHAT) + ",\n{]", "rows.json:3:2: not JSON"),
        ('[{"text": "a", "text": "b"}]', 'rows.json row 1: the key "text" is there twice'),
        ("[1]", "rows.json row 1: the row is a number"),
    ],
)
def test_what_is_wrong_in_a_json_array_is_named(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "rows.json", text))
    assert what in caught.value.what


def test_csv_has_columns_with_text(tmp_path: Path) -> None:
    for delimiter, name in ((",", "rows.csv"), ("\t", "rows.tsv"), (",", "rows.CSV")):
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["question", "answer"], ["Who,\nme?", 'A "sailor".'], ["Why?", "Привет"]])
        found = read(path, ds_type="csv")
        assert found.format == "question/answer"
        assert contents(found) == [["Who,\nme?", 'A "sailor".'], ["Why?", "Привет"]]
        assert [row.where for row in found.rows] == [f"{path}:2", f"{path}:4"]


def test_messages_in_csv_are_json_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "tools"], [json.dumps(CHAT["messages"]), ""]])
    assert contents(read(path)) == [["Hi", "Ahoy"]]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("question,answer\na,b\nc\n", ":3: the row has 1 values"),
        ("question,question\na,b\n", ":1: the column 'question' is there twice"),
        ('question,answer\na,"b', ":2: not CSV"),
        (b"question,answer\na,\xff\n", "not UTF-8"),
        (b"question,answer\na,b\x01\x00\n", ":2: a NUL character"),
        ("question,answer\n", "is empty"),
        ("question,answer\na,\n", ":2: answer is empty"),
        ("question;answer\na;b\n", ":2: no known format, the row has question;answer"),
    ],
)
def test_what_is_wrong_in_a_csv_file_is_named(tmp_path: Path, text: str | bytes, what: str) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "rows.csv", text))
    assert what in caught.value.what


def test_parquet_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    messages = [{**USER, "name": None}, {**ANSWER, "name": None}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages, "id": 1}] * 3), path)
    file = read(path, ds_type="parquet")
    assert (contents(file), file.unused, file.duplicates) == ([["Hi", "Ahoy"]] * 3, ("id",), 2)
    parquet.write_table(pyarrow.Table.from_pylist([{"question": "a", "answer": "b"}, {"question": "a"}]), path)
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.what == f"{path} row 2: answer is missing"
    write(path, path.read_bytes()[:-20])
    with pytest.raises(DataError, match="no Parquet file that can be read"):
        read(path)


def test_gzip_around_any_of_them(tmp_path: Path) -> None:
    packed = gzip.compress((json.dumps(CHAT) + "\n" + json.dumps(BAD)).encode())
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "rows.jsonl.gz", packed))
    assert caught.value.what.endswith("rows.jsonl.gz:2: messages is empty")
    assert "zcat" in caught.value.hint
    assert contents(read(write(tmp_path / "rows.json.gz", gzip.compress(json.dumps([CHAT]).encode())))) == [
        ["Hi", "Ahoy"]
    ]
    assert contents(read(write(tmp_path / "rows.csv.gz", gzip.compress(b"question,answer\nHi,Ahoy\n")))) == [
        ["Hi", "Ahoy"]
    ]
    with pytest.raises(DataError, match="cannot be read"):
        read(write(tmp_path / "cut.jsonl.gz", packed[:-9]))


@pytest.mark.parametrize(
    ("content", "what", "hint"),
    [
        (json.dumps(CHAT).encode("utf-16"), "is UTF-16", "iconv -f UTF-16 -t UTF-8 rows.jsonl"),
        (b"PK\x03\x04rest", "is a zip archive", "unzip"),
        (b"\x28\xb5\x2f\xfdrest", "is compressed with zstd", "unzstd"),
        (json.dumps(CHAT, ensure_ascii=False).replace("Ahoy", "é").encode("latin-1"), "is not UTF-8", "sed -n 1p"),
    ],
)
def test_other_encodings_are_named_with_what_to_do(tmp_path: Path, content: bytes, what: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "rows.jsonl", content))
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_a_gigantic_line_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 1 << 20)
    good = json.dumps(CHAT).encode() + b"\n"
    path = write(tmp_path / "rows.jsonl", good + b'{"text": "' + b"x" * (3 << 20) + b'"}\n' + good)
    with pytest.raises(DataError, match=":2: the line is longer than 1 MiB"):
        read(path)
    file = read(path, skip_bad_rows=1)
    assert [row.where for row in file.rows] == [f"{path}:1", f"{path}:3"]


def test_a_ds_type_that_the_file_is_not_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", json.dumps(CHAT))
    assert len(read(path, ds_type="json").rows) == 1
    with pytest.raises(DataError, match="is JSON lines"):
        read(path, ds_type="parquet")


def test_some_bad_rows_can_be_left_out_and_are_listed(tmp_path: Path) -> None:
    rows = [BAD, CHAT, {"prompt": "a"}, CHAT, CHAT]
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    file = read(path, skip_bad_rows=2)
    assert len(file.rows) == 3
    assert file.skipped == (f"{path}:1: messages is empty", f"{path}:3: no messages")
    assert file.duplicates == 2
    with pytest.raises(DataError) as caught:
        read(path, skip_bad_rows=1)
    assert caught.value.what == f"{path}:1: messages is empty"
    assert "2 of 5 rows are bad" in caught.value.why
    assert "skip_bad_rows allows 1" in caught.value.why


def test_rows_are_the_same_each_time_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", (json.dumps(CHAT) + "\n") * 4)
    file = read(path)
    assert file.rows[0] == file.rows[0]
    assert [row.where for row in file.rows[1:3]] == [f"{path}:2", f"{path}:3"]
    assert file.chat
