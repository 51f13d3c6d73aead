"""S3 servers that cannot keep the promises are refused, and what may be done about it is explicit."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from typing import Any

import pytest

from adapterhub.errors import UnsafeStore
from adapterhub.refs import AdapterName
from adapterhub.registry import ObjectRegistry
from adapterhub.registry.doctor import notes, prove
from adapterhub.registry.s3.address import Address
from adapterhub.registry.s3.requests import Patience, Sizes
from adapterhub.registry.s3.store import S3Store

EAGER = Patience(wait=lambda seconds: None)


@pytest.fixture
def rclone(rclone_endpoint: str, s3_address: Address) -> Address:
    return replace(s3_address, endpoint=rclone_endpoint)


def test_a_server_that_overwrites_is_refused_with_the_way_out(
    rclone: Address, new_draft: Any, name: AdapterName
) -> None:
    store = S3Store(rclone, patience=EAGER)
    for action in (
        lambda: prove(store),
        lambda: ObjectRegistry(store).publish(new_draft(), name=name, author="ana"),
    ):
        with pytest.raises(UnsafeStore, match="overwrites what was published") as refused:
            action()
        assert "single_writer=true" in refused.value.hint
    assert store.keys("") == []


def test_a_single_writer_says_so_every_time(rclone: Address, new_draft: Any, name: AdapterName) -> None:
    alone = S3Store(replace(rclone, single_writer=True), patience=EAGER)
    registry = ObjectRegistry(alone)
    for _ in range(2):
        registry.publish(new_draft(), name=name, author="ana")
    assert registry.numbers(name) == [2, 1]
    assert json.loads(alone.read("registry.json"))["single_writer"] is True
    assert "nothing guards" in notes(alone)[0]
    with pytest.raises(UnsafeStore, match="single writer") as refused:
        ObjectRegistry(S3Store(rclone, patience=EAGER)).publish(new_draft(), name=name, author="ana")
    assert "add single_writer=true" in refused.value.hint


def test_a_registry_of_many_writers_is_not_opened_by_a_single_one(
    s3_address: Address, new_draft: Any, name: AdapterName
) -> None:
    ObjectRegistry(S3Store(s3_address, patience=EAGER)).publish(new_draft(), name=name, author="ana")
    alone = S3Store(replace(s3_address, single_writer=True), patience=EAGER)
    with pytest.raises(UnsafeStore, match="many writers"):
        ObjectRegistry(alone).publish(new_draft(), name=name, author="ana")


@pytest.mark.slow
def test_rclone_takes_and_gives_large_files(rclone: Address) -> None:
    alone = S3Store(replace(rclone, single_writer=True), patience=EAGER)
    value = bytes(range(256)) * (Sizes().large // 256 + 5000)
    sha256 = hashlib.sha256(value).hexdigest()
    for _ in range(2):
        alone.create_file("a/large", io.BytesIO(value), size=len(value), sha256=sha256)
    with alone.open("a/large", offset=12345) as stream:
        assert b"".join(iter(stream.read, b"")) == value[12345:]
    assert alone.sweep(older_than=-60) == 0


def test_lost_replies_do_not_make_a_store_unsafe(s3_address: Address, proxy: Any) -> None:
    for where in ("-read", "-twice", "-race", "-list-1", "-file"):
        proxy.breaks("lose", "PUT", where)
    assert prove(S3Store(replace(s3_address, endpoint=proxy.url), patience=EAGER))


def test_versions_and_locks_of_a_bucket_are_told(s3_endpoint: str, s3_address: Address) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
    rule = {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}}
    client.put_object_lock_configuration(
        Bucket="locked", ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule}
    )
    store = S3Store(replace(s3_address, bucket="locked"), patience=EAGER)
    assert prove(store)
    versions, lock = notes(store)
    assert "old versions" in versions
    assert "object lock" in lock


def test_the_command_proves_or_refuses(
    s3_address: Address, rclone: Address, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ah(*words: str) -> tuple[int, str, str]:
        from adapterhub.cli.main import main

        monkeypatch.setattr("sys.argv", ["ah", "registry", "doctor", *words])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    code, out, _ = ah(s3_address.url)
    assert code == 0
    assert "a key is created once" in out
    code, out, _ = ah(s3_address.url, "--json")
    assert json.loads(out)["registry"] == s3_address.url
    assert len(json.loads(out)["proofs"]) == 5
    code, _, err = ah(rclone.url)
    assert code == 2
    assert "overwrites what was published" in err
    assert "single_writer=true" in err
