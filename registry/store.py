"""The Store protocol: the one primitive under the registry, "create this key unless it exists".

Keys are ``/``-separated text built in `layout` alone. One contract suite (tests/registry/test_store_contract.py) runs
against every implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol, runtime_checkable

from adapterhub.errors import AlreadyExists, IntegrityError, InvalidName

MAX_VALUE = 64 * 2**20  # bytes that `Store.read` reads at most


@dataclass(frozen=True)
class Entry:
    """What a store knows of a key without reading it."""

    key: str
    size: int  # bytes
    modified: float  # seconds since 1970, by the store's own clock


class Store(Protocol):
    """Write-once keys.

    Promises, to any number of processes on any machines:

    * `create` is atomic and durable: when it returns, every reader sees the whole value, also after a crash of this
      machine; of several creates of one key exactly one returns, the others raise AlreadyExists. A crash in the
      middle leaves the key absent.
    * what was created is read and listed by everyone at once (strong read-after-write and list-after-write)
    * nothing is overwritten

    Any method may raise StorageError, and InvalidName for a key that `check_key` refuses.
    """

    @property
    def url(self) -> str: ...

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        """Raises AlreadyExists. What is not ``lasting`` is a hint: a crash of this machine may lose it."""

    def create_file(self, key: str, source: BinaryIO, *, size: int, sha256: str) -> None:
        """Create a key from a stream, hashing on the way; for blobs, whose key is their content.

        ``source`` stands at its start. A key that exists is left as it is (its content is the same): no error, but
        IntegrityError where the store can tell, without a transfer, that what it holds is damaged. AdapterError,
        leaving no key, when the stream is not ``size`` bytes with that ``sha256``. A create that was killed may go
        on where it stopped when it is called again.
        """

    def read(self, key: str) -> bytes:
        """For JSON. Raises NotFound, and without reading it IntegrityError for more than `MAX_VALUE` bytes."""

    def open(self, key: str, *, offset: int = 0) -> BinaryIO:
        """A stream over the value from byte ``offset`` on, for large ones. Raises NotFound.

        Its ``read`` raises StorageError when the store goes away in the middle and does not come back.
        """

    def exists(self, key: str) -> bool: ...

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        """Keys below ``prefix`` (which ends in ``/``) that sort after ``after``, ascending, at most ``limit``."""

    def entries(self, prefix: str) -> Iterator[Entry]:
        """What is below ``prefix``, in the order of `keys`, with size and age."""

    def folders(self, prefix: str) -> list[str]:
        """Names of the next path part below ``prefix``, ascending: what S3 calls common prefixes."""

    def delete(self, *keys: str) -> None:
        """For garbage collection and deletion of tenants alone. No error where there is no such key."""

    def clear(self, prefix: str) -> None:
        """Remove all that is below a prefix where nobody writes again, in the order of `keys`, unfinished or not."""

    def sweep(self, *, older_than: float, dry_run: bool = False) -> int:
        """Remove what killed writers left unfinished more than ``older_than`` seconds ago; returns how many."""


@runtime_checkable
class Guarded(Protocol):
    """What a store behind a vendor's service tells besides: not every one keeps the promises of `Store`."""

    @property
    def single_writer(self) -> bool:
        """Whether its user vouches that one process alone writes, because it cannot create unless absent."""

    @property
    def way_out(self) -> str:
        """What to do when it breaks a promise."""

    def notes(self) -> list[str]:
        """What its user should know and is no broken promise."""


def check_key(key: str) -> None:
    """Raises InvalidName for a key that as a path would name something else: empty, ``.`` or ``..`` parts, NUL."""
    if "\0" in key or "\\" in key or any(part in {"", ".", ".."} for part in key.split("/")):
        raise InvalidName(f"{key!a} cannot be a key of a registry")


def check_size(key: str, size: int) -> None:
    """Raises IntegrityError for a value of ``size`` bytes that `Store.read` must not read."""
    if size > MAX_VALUE:
        raise IntegrityError(
            f"{key} is too large to be read", why=f"it has {size} bytes; at most {MAX_VALUE} are ever written there"
        )


def create_hint(store: Store, key: str, value: bytes = b"", *, lasting: bool = True) -> None:
    """Create a key that only we write, or whose value is the same whoever writes it: one that is there is fine."""
    try:
        store.create(key, value, lasting=lasting)
    except AlreadyExists:
        return
