"""Requests to one bucket: made by boto3, tried again by us.

botocore's own retries are off: here they are counted, jittered and can be tested, and a conflict (409) is tried again
as S3 asks for. A create whose reply was lost is tried again too, and then finds its own key: AlreadyExists. Who creates
knows its own value when it reads it (`publishing`, `logs`).
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from adapterhub.errors import UsageError
from adapterhub.registry.s3.address import Address
from adapterhub.registry.s3.errors import foreign, is_passing, is_timeout, wrapped

T = TypeVar("T")
_CONNECTIONS = 32  # at once
_MAKING = threading.Lock()  # a session makes one client at a time


@dataclass(frozen=True)
class Patience:
    """How long to wait for a store, and how often to ask again. Times in seconds."""

    connect: float = 5.0
    read: float = 30.0  # without a byte, or with next to none
    attempts: int = 6
    attempts_timeout: int = 3  # where each took `read` to fail
    first_pause: float = 0.2  # doubled each time, before jitter
    longest_pause: float = 10.0
    wait: Callable[[float], None] = time.sleep

    def pause(self, failures: int) -> float:
        """Full jitter, https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter."""
        longest = min(self.longest_pause, self.first_pause * 2 ** (failures - 1))
        return random.uniform(0, longest)  # noqa: S311 - jitter, no secret


def patience_of(timeout: float | None) -> Patience:
    """The usual one, but for the seconds that its user would wait for an answer."""
    return Patience() if timeout is None else Patience(connect=min(timeout, Patience.connect), read=timeout)


@dataclass(frozen=True)
class Sizes:
    """Bytes of what goes over the wire at once. An upload holds nine parts in memory, a download six ranges."""

    large: int = 64 * 2**20  # from here on a file goes in parts
    part: int = 8 * 2**20
    range: int = 8 * 2**20


class Requests:
    """A client of one bucket, for any number of threads; made by the first request."""

    def __init__(self, address: Address, patience: Patience, sizes: Sizes) -> None:
        self.address = address
        self.patience = patience
        self.sizes = sizes
        self._client: Any = None

    def call(self, operation: str, *, key: str = "", **parameters: Any) -> dict[str, Any]:
        """One operation of boto3's client, on ``key`` of the registry where it is about one.

        Raises:
            AlreadyExists: a condition did not hold.
            NotFound: no such key.
            StorageError: anything else, said in our words.
        """
        return self.tried(lambda: self.once(operation, key=key, **parameters), key=key)

    def once(self, operation: str, *, key: str = "", **parameters: Any) -> dict[str, Any]:
        """Like `call`, tried once; raises what boto3 raises."""
        if key:
            parameters["Key"] = self.address.key(key)
        answer: dict[str, Any] = getattr(self._connected(), operation)(Bucket=self.address.bucket, **parameters)
        return answer

    def tried(self, action: Callable[[], T], *, key: str = "", progress: Callable[[], int] = int) -> T:
        """Do ``action`` until it succeeds or patience ends, which begins anew whenever ``progress`` says more."""
        failures, done = 0, progress()
        while True:
            try:
                return action()
            except foreign() as error:
                failures = 1 if progress() > done else failures + 1
                done = progress()
                most = self.patience.attempts_timeout if is_timeout(error) else self.patience.attempts
                if failures >= most or not is_passing(error):
                    raise wrapped(error, self.address, key=key) from error
            self.patience.wait(self.patience.pause(failures))

    def pages(self, operation: str, tokens: dict[str, str], **parameters: Any) -> Iterator[dict[str, Any]]:
        """All pages of a listing. ``tokens``: field of a page → parameter of the next request."""
        while True:
            page = self.call(operation, **parameters)
            yield page
            if not page.get("IsTruncated"):
                return
            parameters |= {parameter: page[field] for field, parameter in tokens.items() if page.get(field)}

    def _connected(self) -> Any:
        with _MAKING:
            if self._client is None:
                self._client = _client(self.address, self.patience)
            return self._client


@cache
def session(profile: str, region: str) -> Any:
    """boto3's, with the credentials: one for all clients of a process, because reading S3's model takes 0.1 s."""
    import boto3

    return boto3.session.Session(profile_name=profile or None, region_name=region or None)


def _client(address: Address, patience: Patience) -> Any:
    from botocore.config import Config

    own_endpoint = address.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    try:
        ours = session(address.profile, address.region)
        return ours.client(
            "s3",
            endpoint_url=address.endpoint or None,
            # a store of one's own has no regions, but the signature needs one
            region_name=ours.region_name or ("us-east-1" if own_endpoint else None),
            config=Config(
                connect_timeout=patience.connect,
                read_timeout=patience.read,
                retries={"total_max_attempts": 1, "mode": "standard"},
                max_pool_connections=_CONNECTIONS,
                # newer defaults add trailers that many stores refuse; we send and compare sha256 ourselves
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                # x-amz-checksum-sha256 is signed with the headers, so hashing the body twice proves nothing more
                s3={"payload_signing_enabled": False, **_addressing(address, own_endpoint=bool(own_endpoint))},
            ),
        )
    except ValueError as error:  # botocore: "Invalid endpoint"
        raise UsageError(f"{address.url} cannot be used", why=str(error), hint="look at endpoint=") from error


def _addressing(address: Address, *, own_endpoint: bool) -> dict[str, str]:
    """Few stores of one's own have a DNS name for every bucket; on AWS botocore and the profile know best."""
    if address.path_style is None:
        return {"addressing_style": "path"} if own_endpoint else {}
    return {"addressing_style": "path" if address.path_style else "virtual"}
