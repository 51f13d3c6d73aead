"""Local copies of what is likely to be asked for, made while the engine loads its base and nothing else needs the disk.

    with Prefetch(cache, likely(registry, working_set, fits=…, most=16), room=…):
        ...                                  # begins no other copy once this is over

By use first: what the last server here held, the last used first. Then by channel: what each channel and ``latest`` of
each adapter mean. As many as the engine holds, so that a large registry is not copied whole. It is a help and no
promise: what cannot be fetched now is fetched, or refused with the reason, when it is asked for.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from types import TracebackType
from typing import Self

from adapterhub.errors import AdapterHubError
from adapterhub.manifest import BaseFingerprint, Record
from adapterhub.refs import AdapterRef
from adapterhub.registry.base import Registry
from adapterhub.registry.cache import Cache
from adapterhub.registry.signing import Signers
from adapterhub.serving.adapters import workingset
from adapterhub.serving.adapters.versions import unfit
from adapterhub.serving.adapters.workingset import WorkingSet
from adapterhub.serving.config import ServeConfig

log = logging.getLogger(__name__)


def prefetching(config: ServeConfig, *, registry: Registry, base: BaseFingerprint) -> Prefetch:
    """For a server that is about to start."""
    working = workingset.path_of(config.cache, registry=config.registry, base=base.content)
    records = likely(
        registry,
        workingset.read(working),
        fits=lambda record: unfit(record, base=base, max_lora_rank=config.max_lora_rank) is None,
        most=config.max_cpu_loras,
    )
    cache = Cache(config.cache, registry, signers=Signers.read(config.require_signed_by))
    return Prefetch(cache, records, room=config.cache_limit)


def likely(registry: Registry, working: WorkingSet, *, fits: Callable[[Record], bool], most: int) -> Iterator[Record]:
    """At most ``most`` versions that ``fits``, each once, the likeliest first. Blocking, as they are asked for."""

    def found() -> Iterator[Record]:
        seen = set()
        for ref in _references(registry, working):
            try:
                record = registry.resolve(ref).record
            except AdapterHubError:  # yanked, or gone
                continue
            if record.digest not in seen and fits(record):
                seen.add(record.digest)
                yield record

    return islice(found(), most)


def _references(registry: Registry, working: WorkingSet) -> Iterator[AdapterRef]:
    for text in (*working.pins, *reversed(working.versions), *working.references):
        try:
            yield AdapterRef.parse(text)
        except AdapterHubError:  # the file is a hint, and may say anything
            continue
    for tenant in registry.tenants():
        for name in registry.adapters(tenant):
            yield AdapterRef.parse(str(name))
            for move in registry.channels(name).values():
                yield from (name.at(target.version) for target in move.targets)


class Prefetch:
    """Fetches in a thread of its own, from entry to exit; a copy that is under way then is finished, and the last."""

    def __init__(self, cache: Cache, records: Iterable[Record], *, room: int | None = None) -> None:
        """``room`` in bytes: no more than that are fetched, or looked at again; None: no bound."""
        self._cache = cache
        self._records = records
        self._room = room
        self._over = threading.Event()
        self.count = 0  # versions that are here now

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def wait(self, seconds: float) -> None:
        """Until all is fetched."""
        self._thread.join(seconds)

    def _run(self) -> None:
        left = self._room
        try:
            for record in self._records:
                if left is not None and (left := left - record.manifest.size) < 0:
                    return
                if self._over.is_set():
                    return
                self._fetch(record)
        except AdapterHubError as error:
            log.info("nothing more is fetched in advance: %s", error)

    def _fetch(self, record: Record) -> None:
        try:
            self._cache.fetch(record)
            self.count += 1
        except AdapterHubError as error:
            log.info("%s is not fetched in advance: %s", record.ref, error)
