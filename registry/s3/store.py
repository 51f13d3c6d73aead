"""The Store on S3, and on what speaks like it.

A create is a PUT with ``If-None-Match: *``. What is large goes in parts (`upload`) and comes in ranges
(`download`); `requests` asks again where that helps, `errors` says what went wrong, `address` reads the URL.

A store that ignores the condition would overwrite. The doctor finds out before the first version is written; with
``single_writer=true`` in the address we look before we write instead, which is safe for one writer and no more.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO, cast

from adapterhub.errors import AdapterError, AlreadyExists, IntegrityError, NotFound, StorageError
from adapterhub.registry.s3.address import Address
from adapterhub.registry.s3.download import Stream, pieces
from adapterhub.registry.s3.errors import Denied, UploadGone, was_answered, way_out
from adapterhub.registry.s3.requests import Patience, Requests, Sizes, patience_of
from adapterhub.registry.s3.upload import Upload, read_fully
from adapterhub.registry.store import Entry, check_key, check_size

_PAGE = 1000  # keys of a LIST, and of a DeleteObjects
_NEXT_PAGE = {"NextContinuationToken": "ContinuationToken"}


class S3Store:
    """Keys below a prefix of a bucket. Touches nothing until it is asked."""

    def __init__(self, address: Address, *, patience: Patience | None = None, sizes: Sizes | None = None) -> None:
        self.address = address
        self._requests = Requests(address, patience or patience_of(address.timeout), sizes or Sizes())

    @property
    def url(self) -> str:
        return self.address.url

    @property
    def single_writer(self) -> bool:
        return self.address.single_writer

    @property
    def way_out(self) -> str:
        return way_out(self.address)

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        check_key(key)
        self._put(key, value, hashlib.sha256(value).digest())

    def create_file(self, key: str, source: BinaryIO, *, size: int, sha256: str) -> None:
        check_key(key)
        if self._is_stored(key, size=size, sha256=sha256):
            return
        if size >= self._requests.sizes.large:
            upload = Upload(self._requests, key, size=size, sha256=sha256, conditional=not self.single_writer)
            upload.send(source, exists=lambda: self._is_stored(key, size=size, sha256=sha256))
            return
        value = read_fully(source, size + 1)
        digest = hashlib.sha256(value)
        if (len(value), digest.hexdigest()) != (size, sha256):
            raise AdapterError(
                f"{key} was not stored: its bytes are others than announced",
                why=f"{len(value)} bytes with sha256 {digest.hexdigest()[:12]}…, not {size} with {sha256[:12]}…",
            )
        try:
            self._put(key, value, digest.digest())
        except AlreadyExists:  # somebody stored the same bytes meanwhile
            return

    def read(self, key: str) -> bytes:
        check_key(key)

        def whole() -> bytes:
            answer = self._requests.once("get_object", key=key)
            size = answer["ContentLength"]
            try:
                check_size(key, size)
            except IntegrityError:
                answer["Body"].close()
                raise
            return b"".join(pieces(answer["Body"], size, self._requests.patience.read))

        try:
            return self._requests.tried(whole, key=key)
        except Denied as error:
            raise self._absent_or(error, key) from error

    def open(self, key: str, *, offset: int = 0) -> BinaryIO:
        check_key(key)
        try:
            return cast(BinaryIO, Stream(self._requests, key, offset))
        except Denied as error:
            raise self._absent_or(error, key) from error

    def exists(self, key: str) -> bool:
        check_key(key)
        try:
            self._requests.call("head_object", key=key)
        except NotFound:
            return False
        except StorageError as error:
            if not was_answered(error):
                raise
            return self._is_listed(key)
        return True

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        found: list[str] = []
        start = {"StartAfter": self.address.key(after)} if after else {}
        while limit is None or len(found) < limit:
            most = _PAGE if limit is None else min(limit - len(found), _PAGE)
            page = self._requests.call("list_objects_v2", Prefix=self.address.key(prefix), MaxKeys=most, **start)
            found += [self.address.own(item["Key"]) for item in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                break
            start = {"ContinuationToken": page["NextContinuationToken"]}
        return found

    def entries(self, prefix: str) -> Iterator[Entry]:
        for page in self._requests.pages("list_objects_v2", _NEXT_PAGE, Prefix=self.address.key(prefix)):
            for item in page.get("Contents", ()):
                yield Entry(self.address.own(item["Key"]), item["Size"], item["LastModified"].timestamp())

    def folders(self, prefix: str) -> list[str]:
        whole = self.address.key(prefix)
        pages = self._requests.pages("list_objects_v2", _NEXT_PAGE, Prefix=whole, Delimiter="/")
        common = (item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ()))
        return [name.removeprefix(whole).removesuffix("/") for name in common]

    def delete(self, *keys: str) -> None:
        for key in keys:
            check_key(key)
        if len(keys) == 1:
            self._requests.call("delete_object", key=keys[0])
            return
        for start in range(0, len(keys), _PAGE):
            self._delete_batch(keys[start : start + _PAGE])

    def clear(self, prefix: str) -> None:
        for upload in self._uploads(prefix):
            self._abort(self.address.own(upload["Key"]), upload["UploadId"])
        while keys := self.keys(prefix, limit=_PAGE):
            self.delete(*keys)

    def sweep(self, *, older_than: float, dry_run: bool = False) -> int:
        horizon = datetime.now(UTC) - timedelta(seconds=older_than)
        stale = [upload for upload in self._uploads() if upload["Initiated"] < horizon]
        if dry_run:
            return len(stale)
        return sum(self._abort(self.address.own(upload["Key"]), upload["UploadId"]) for upload in stale)

    def notes(self) -> list[str]:
        """What the doctor should say of the bucket, beside the promises that it keeps."""
        found = []
        if self.single_writer:
            found.append("single_writer=true: two writers at once would lose versions; nothing guards against them")
        if self._asked("get_bucket_versioning").get("Status") == "Enabled":
            found.append(
                "the bucket keeps old versions: what is deleted still takes room until a lifecycle rule "
                "(NoncurrentVersionExpiration) removes it"
            )
        lock = self._asked("get_object_lock_configuration").get("ObjectLockConfiguration", {})
        if lock.get("Rule"):
            found.append(
                "the bucket has object lock with a default retention: `ah gc` and the deletion of a tenant "
                "free nothing before it ends"
            )
        return found

    def _asked(self, operation: str) -> dict[str, Any]:
        """The answer, empty where the store has none or we may not ask."""
        try:
            return self._requests.call(operation)
        except (StorageError, NotFound):
            return {}

    def _put(self, key: str, value: bytes, digest: bytes) -> None:
        """Raises AlreadyExists."""
        condition = {"IfNoneMatch": "*"}
        if self.single_writer:
            condition = {}
            if self.exists(key):
                raise AlreadyExists(f"{key} exists in {self.address.name}")
        checksum = {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": b64encode(digest).decode()}
        self._requests.call("put_object", key=key, Body=value, **checksum, **condition)

    def _is_stored(self, key: str, *, size: int, sha256: str) -> bool:
        """Raises IntegrityError where the store has something else than it should."""
        try:
            found = self._requests.call("head_object", key=key, ChecksumMode="ENABLED")
        except NotFound:
            return False
        except StorageError as error:
            if not was_answered(error):
                raise
            return self._is_listed(key)
        told = found.get("ChecksumSHA256", "")
        in_parts = "-" in told + found.get("ETag", "")  # "…-3": then it is the hash of the parts' hashes
        wrong = told and not in_parts and told != b64encode(bytes.fromhex(sha256)).decode()
        if found["ContentLength"] != size or wrong:
            raise IntegrityError(
                f"the registry's copy of {key} is damaged",
                why=f"it has {found['ContentLength']} bytes, not {size}" if not wrong else "it has another sha256",
                hint=f"aws s3 rm s3://{self.address.bucket}/{self.address.key(key)}, then publish the adapter again",
            )
        return True

    def _is_listed(self, key: str) -> bool:
        return self.address.key(key) in {
            item["Key"]
            for item in self._requests.call("list_objects_v2", Prefix=self.address.key(key), MaxKeys=1).get(
                "Contents", ()
            )
        }

    def _absent_or(self, denied: Denied, key: str) -> StorageError | NotFound:
        """Whose listing is limited to a prefix is told 403 for what is not there: look where it may look."""
        try:
            return denied if self._is_listed(key) else NotFound(f"{key} is not in {self.address.name}")
        except Denied:
            return denied

    def _delete_batch(self, keys: tuple[str, ...]) -> None:
        wanted = {"Objects": [{"Key": self.address.key(key)} for key in keys], "Quiet": True}
        try:
            failed = self._requests.call("delete_objects", Delete=wanted).get("Errors", [])
        except Denied:
            raise
        except StorageError:  # some stores have no DeleteObjects, or want an MD5 that boto3 sends no more
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda key: self._requests.call("delete_object", key=key), keys))
            return
        if failed:
            raise StorageError(
                f"{len(failed)} keys of {self.address.name} were not deleted",
                why=f"{failed[0].get('Key')}: {failed[0].get('Code')} {failed[0].get('Message', '')}".strip(),
                hint="ask for s3:DeleteObject below the prefix; docs/trust.md has a policy",
            )

    def _uploads(self, below: str = "") -> Iterator[dict[str, Any]]:
        """All uploads by parts that were not finished."""
        markers = {"NextKeyMarker": "KeyMarker", "NextUploadIdMarker": "UploadIdMarker"}
        prefix = self.address.key(below)
        try:
            for page in self._requests.pages("list_multipart_uploads", markers, Prefix=prefix):
                yield from page.get("Uploads", ())
        except UploadGone:  # rclone's way to say "none"
            return

    def _abort(self, key: str, upload: str) -> int:
        try:
            self._requests.call("abort_multipart_upload", key=key, UploadId=upload)
        except UploadGone:  # its writer is done, or another sweeper was first
            return 0
        return 1
