"""A large value read from S3: ranges fetched ahead, several at once, handed out in order.

A range that breaks off goes on at its next byte. A body that ends early, or comes so slowly that it never would end, is
broken off and asked for again. All ranges are of one object: If-Match on its ETag.
"""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from adapterhub.errors import AlreadyExists, StorageError, UnsafeStore
from adapterhub.registry.s3.errors import Broken, PastEnd
from adapterhub.registry.s3.requests import Requests

PARALLEL = 4
AHEAD = (
    5  # ranges on the way or waiting to be read, beside the one that is read: 48 MiB, whatever the size of the value
)
_PIECE = 256 * 2**10  # bytes of a read from the socket
_SLOWEST = 1024  # bytes a second: below this for the time of one timeout, a body stands still


class Stream(io.RawIOBase):
    """The value of a key from an offset on. Raises NotFound when it is made, StorageError while it is read."""

    def __init__(self, requests: Requests, key: str, offset: int) -> None:
        super().__init__()
        self._requests = requests
        self._key = key
        self._closing = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[bytearray]] = deque()
        self._spare: list[bytearray] = []  # ranges that were read: the next ones go there, no page is faulted in again
        self._buffer = bytearray()
        first = _First(requests, key, offset, self._closing)
        self._current = first.read()
        self._etag, self._size, self._next = first.etag, first.size, offset + len(self._current)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        if not self._current:
            self._current = self._following()
        taken = self._current[: len(target)]
        target[: len(taken)] = taken
        self._current = self._current[len(taken) :]
        return len(taken)

    def read(self, size: int | None = -1, /) -> bytes:
        """At most ``size`` bytes: what is here of the present range, without one copy more."""
        if size is None or size < 0:
            return self.readall()
        if not self._current:
            self._current = self._following()
        taken, self._current = self._current[:size], self._current[size:]
        return bytes(taken)

    def close(self) -> None:
        if self._pool is not None:
            self._closing.set()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        super().close()

    def _following(self) -> memoryview:
        """The next range; empty at the end."""
        if len(self._buffer) == self._requests.sizes.range:
            self._spare.append(self._buffer)
        while self._next < self._size and len(self._ahead) < AHEAD:
            start, self._next = self._next, min(self._next + self._requests.sizes.range, self._size)
            size = self._next - start
            data = self._spare.pop() if self._spare and size == self._requests.sizes.range else bytearray(size)
            self._ahead.append(self._threads().submit(self._fetch, start, data))
        self._buffer = self._ahead.popleft().result() if self._ahead else bytearray()
        return memoryview(self._buffer)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="ah-download")
        return self._pool

    def _fetch(self, start: int, data: bytearray) -> bytearray:
        """Fill ``data`` with the bytes from ``start`` on."""
        end, filled = start + len(data), 0

        def rest() -> None:
            nonlocal filled
            answer = self._requests.once(
                "get_object", key=self._key, Range=f"bytes={start + filled}-{end - 1}", IfMatch=self._etag
            )
            _check_range(answer, start + filled, self._requests)
            for piece in pieces(answer["Body"], end - start - filled, self._requests.patience.read, self._closing):
                data[filled : filled + len(piece)] = piece
                filled += len(piece)

        try:
            self._requests.tried(rest, key=self._key, progress=lambda: filled)
        except AlreadyExists as error:  # the condition that failed is If-Match
            raise StorageError(
                f"{self._key} was written again while it was read", hint="type the same command again"
            ) from error
        return data


class _First:
    """The first range, which tells the size and the ETag of the rest."""

    def __init__(self, requests: Requests, key: str, offset: int, closing: threading.Event) -> None:
        self._requests = requests
        self._key = key
        self._offset = offset
        self._closing = closing
        self._data = bytearray()
        self.etag = ""
        self.size = 0  # bytes of the whole value

    def read(self) -> memoryview:
        try:
            self._requests.tried(self._rest, key=self._key, progress=lambda: len(self._data))
        except PastEnd:
            return memoryview(b"")
        return memoryview(self._data)

    def _rest(self) -> None:
        start = self._offset + len(self._data)
        end = self._offset + self._requests.sizes.range
        wanted = f"bytes={start}-{end - 1}"
        condition = {"IfMatch": self.etag} if self._data else {}
        answer = self._requests.once("get_object", key=self._key, Range=wanted, **condition)
        self.etag = answer["ETag"]
        self.size = _check_range(answer, start, self._requests)
        left = min(end, self.size) - start
        for piece in pieces(answer["Body"], left, self._requests.patience.read, self._closing):
            self._data += piece


def pieces(body: Any, size: int, patience: float, closing: threading.Event | None = None) -> Any:
    """The next ``size`` bytes of a body as they come. Raises Broken when they do not: too few, too slow, cut off.

    ``patience``: seconds. A timeout of the socket alone would wait for ever on a byte now and then.
    """
    from urllib3.exceptions import HTTPError

    # StreamingBody.read waits until all that was asked for is there
    read1: Callable[[int], bytes] = body._raw_stream.read1
    since, come = time.monotonic(), 0
    try:
        while size:
            if closing is not None and closing.is_set():
                raise StorageError("the stream was closed")
            piece = read1(min(size, _PIECE))
            if not piece:
                raise Broken(f"the body ended {size} bytes early")
            size, come = size - len(piece), come + len(piece)
            if time.monotonic() - since > patience:
                if come < _SLOWEST * patience:
                    raise Broken(f"{come} bytes came in {patience:.0f} s")
                since, come = time.monotonic(), 0
            yield piece
    except (HTTPError, OSError) as error:
        raise Broken(str(error)) from error
    finally:
        body.close()


def _check_range(answer: dict[str, Any], start: int, requests: Requests) -> int:
    """Bytes of the whole value, when the answer begins where we asked."""
    told = answer.get("ContentRange", "")  # "bytes 0-99/1000"
    if not told and start == 0:
        return int(answer["ContentLength"])  # all of it
    if not told.startswith(f"bytes {start}-"):
        answer["Body"].close()
        raise UnsafeStore(f"{requests.address.name} cannot be read", why="the store does not honour Range")
    return int(told.rpartition("/")[2])
