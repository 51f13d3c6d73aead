"""A large file on its way to S3: in parts, several at once, each with a CRC-32 that the store compares.

The parts of an upload that was killed stay with the store. The next upload of the same key finds them, reads and
hashes the file from its start, and sends only the parts that are not there. The whole is compared with its sha256
before the store is told to put the parts together: until then there is no key.
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

from adapterhub.errors import AdapterError, AlreadyExists, UnsafeStore
from adapterhub.registry.s3.errors import Denied, UploadGone
from adapterhub.registry.s3.requests import Requests

PARALLEL = 8  # memory is at most one part more
_MOST_PARTS = 10_000  # S3's limit
_TRIES = 3  # of an upload that somebody else ended


@dataclass(frozen=True)
class Part:
    """What the store has of an upload."""

    number: int  # from 1
    size: int  # bytes
    etag: str
    crc32: str  # base64; empty where the store keeps none

    def holds(self, data: bytes, crc32: str) -> bool:
        """Whether these bytes were sent already."""
        if self.size != len(data):
            return False
        if self.crc32:
            return self.crc32 == crc32
        return self.etag.strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()

    @property
    def plain(self) -> dict[str, Any]:
        """As CompleteMultipartUpload wants it."""
        checksum = {"ChecksumCRC32": self.crc32} if self.crc32 else {}
        return {"PartNumber": self.number, "ETag": self.etag} | checksum


def part_size(size: int, *, usual: int) -> int:
    """Bytes of each part but the last: a function of the file's size alone, or nobody could go on."""
    least = -(-size // _MOST_PARTS)
    return max(usual, -(-least // 2**20) * 2**20)


class Upload:
    """One file to one key."""

    def __init__(self, requests: Requests, key: str, *, size: int, sha256: str, conditional: bool) -> None:
        """``conditional``: whether the store can be told to create only what is absent."""
        self._requests = requests
        self._key = key
        self._size = size
        self._sha256 = sha256
        self._condition = {"IfNoneMatch": "*"} if conditional else {}

    def send(self, source: BinaryIO, *, exists: Callable[[], bool]) -> None:
        """``exists`` tells whether the key is there, for when somebody else ended the upload.

        Raises:
            AdapterError: the stream is not the file that was announced; the upload is aborted.
            StorageError: the store went away; what it has stays for the next try.
        """
        for left in reversed(range(_TRIES)):
            try:
                self._once(source)
                return
            except UploadGone:
                if exists():
                    return
                if not left or not source.seekable():
                    raise
                source.seek(0)

    def _once(self, source: BinaryIO) -> None:
        identity = self._unfinished()
        have = self._parts(identity) if identity else {}
        identity = identity or self._begin()
        whole = hashlib.sha256()
        parts = self._send_parts(identity, self._read(source, whole), have)
        read = sum(part.size for part in parts)
        if (read, whole.hexdigest()) != (self._size, self._sha256):
            self._abort(identity)
            raise AdapterError(
                f"{self._key} was not stored: its bytes are others than announced",
                why=f"{read} bytes with sha256 {whole.hexdigest()[:12]}…, not {self._size} with {self._sha256[:12]}…",
            )
        try:
            plain = {"Parts": [part.plain for part in parts]}
            self._call("complete_multipart_upload", identity, MultipartUpload=plain, **self._condition)
        except AlreadyExists:  # somebody stored the same bytes meanwhile
            self._abort(identity)

    def _send_parts(self, identity: str, chunks: Iterator[bytes], have: dict[int, Part]) -> list[Part]:
        free = threading.BoundedSemaphore(PARALLEL + 1)
        broken = threading.Event()

        def send(number: int, data: bytes) -> Part:
            try:
                return self._send_part(identity, number, data, have.get(number))
            except BaseException:  # raised again, once the other parts know
                broken.set()
                raise
            finally:
                free.release()

        futures: list[Future[Part]] = []
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="ah-upload") as pool:
            for number, data in enumerate(chunks, start=1):
                free.acquire()
                if broken.is_set():
                    break
                futures.append(pool.submit(send, number, data))
        return [future.result() for future in futures]

    def _send_part(self, identity: str, number: int, data: bytes, there: Part | None) -> Part:
        crc32 = b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
        if there is not None and there.holds(data, crc32):
            return there
        checksum = {"ChecksumAlgorithm": "CRC32", "ChecksumCRC32": crc32}
        answer = self._call("upload_part", identity, PartNumber=number, Body=data, **checksum)
        return Part(number, len(data), answer["ETag"], crc32)

    def _read(self, source: BinaryIO, whole: Any) -> Iterator[bytes]:
        """The file's parts in order, hashed into ``whole``; at most one byte more than was announced."""
        size, left = part_size(self._size, usual=self._requests.sizes.part), self._size + 1
        while left and (data := read_fully(source, min(size, left))):
            whole.update(data)
            left -= len(data)
            yield data

    def _unfinished(self) -> str:
        """The newest upload of this key that somebody left; empty: none that we know of."""
        try:
            listed = self._requests.call("list_multipart_uploads", Prefix=self._requests.address.key(self._key))
        except (Denied, UnsafeStore, UploadGone):  # not allowed, not known there, or rclone's way to say "none"
            return ""
        whole_key = self._requests.address.key(self._key)
        found = [upload for upload in listed.get("Uploads", ()) if upload["Key"] == whole_key]
        return str(max(found, key=lambda upload: upload["Initiated"])["UploadId"]) if found else ""

    def _parts(self, identity: str) -> dict[int, Part]:
        parts: dict[int, Part] = {}
        marker = {"NextPartNumberMarker": "PartNumberMarker"}
        try:
            pages = self._requests.pages("list_parts", marker, key=self._key, UploadId=identity)
            for listed in (part for page in pages for part in page.get("Parts", ())):
                part = Part(listed["PartNumber"], listed["Size"], listed["ETag"], listed.get("ChecksumCRC32", ""))
                parts[part.number] = part
        except Denied:
            return {}
        return parts

    def _begin(self) -> str:
        return str(self._requests.call("create_multipart_upload", key=self._key, ChecksumAlgorithm="CRC32")["UploadId"])

    def _abort(self, identity: str) -> None:
        try:
            self._call("abort_multipart_upload", identity)
        except (UploadGone, Denied):  # somebody was first; or the bucket's own rule does it
            return

    def _call(self, operation: str, identity: str, **parameters: Any) -> dict[str, Any]:
        return self._requests.call(operation, key=self._key, UploadId=identity, **parameters)


def read_fully(source: BinaryIO, size: int) -> bytes:
    """``size`` bytes, or what there is until the end: a raw stream gives less at a time."""
    data = source.read(size)
    if not data or len(data) == size:
        return data
    pieces, left = [data], size - len(data)
    while left and (data := source.read(left)):
        pieces.append(data)
        left -= len(data)
    return b"".join(pieces)
