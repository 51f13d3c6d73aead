"""One replica: everything that runs inside the engine's process, put together. No vLLM here; `Engine` is the seam.

middleware ──► rollout.current(ref) ──► admission.turn(ask) ──► residency.lease(version) ──► the engine
               which version now        whose turn it is        loaded until the last byte
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from adapterhub.base import BaseModel
from adapterhub.errors import AdapterHubError, Conflict, Gone, InvalidName, NotFound, StorageError
from adapterhub.manifest import Record
from adapterhub.refs import AdapterRef
from adapterhub.registry.base import Registry
from adapterhub.registry.cache import Cache
from adapterhub.registry.signing import Signers
from adapterhub.serving import gauges
from adapterhub.serving.adapters import workingset
from adapterhub.serving.adapters.residency import Engine, Residency
from adapterhub.serving.adapters.versions import Versions
from adapterhub.serving.adapters.workingset import WorkingSet
from adapterhub.serving.admission.admission import Admission
from adapterhub.serving.admission.fairness import Window
from adapterhub.serving.config import ServeConfig
from adapterhub.serving.draining import UnderWay
from adapterhub.serving.models import card, list_models
from adapterhub.serving.pulse import Pulse
from adapterhub.serving.rollout.rollout import Rollout
from adapterhub.serving.rollout.scoring import Scoring, try_again
from adapterhub.serving.rollout.trials import Trials
from adapterhub.serving.rollout.webhook import Webhook
from adapterhub.serving.telemetry.telemetry import Telemetry
from adapterhub.serving.tenants.access import Access
from adapterhub.serving.tenants.callers import Caller
from adapterhub.serving.tenants.quota import Quota

log = logging.getLogger(__name__)

T = TypeVar("T")
_THREADS = 8  # registry reads and downloads at once; a registry that hangs must not take the engine's own threads


class Replica:
    """The state behind the routes and the middleware."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        registry: Registry,
        base: BaseModel,
        engine: Engine,
        access: Access | None = None,
        window: Window | None = None,
        app: Any = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        """``access`` decides who may come in; by default the single user. ``window`` is what the engine takes.

        ``app`` is the application around it, which is asked the prompts that score a candidate.
        """
        self.telemetry = telemetry or Telemetry.alone()
        self.config = config
        self.access = access or Access()
        self.base = base
        self.registry = registry
        cache = Cache(config.cache, registry, signers=Signers.read(config.require_signed_by))
        self.versions = Versions(cache, base=base, max_lora_rank=config.max_lora_rank)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="adapterhub")
        self.residency = Residency(
            engine,
            capacity=config.max_cpu_loras,
            prepare=self._fetch,
            witness=self.telemetry,
        )
        self.quota = Quota(config.redis)
        self.admission = Admission(window or Window(slots=config.max_loras))
        self.webhook = _webhook(config)
        self.trials = Trials(
            registry,
            blocking=self.blocking,
            moved=lambda: self.rollout.look(),  # which is made below: each needs the other
            clock=time.monotonic,
            score=Scoring(app, config.prompts).score,
        )
        self.rollout = Rollout(
            registry,
            warm=self.residency.ensure,
            blocking=self.blocking,
            approve=self.trials.approve,
            tell=self.webhook.tell if self.webhook else lambda event: None,
        )
        self._working_set_path = workingset.path_of(
            config.cache, registry=config.registry, base=base.fingerprint.content
        )
        self.not_ready = "it is starting"  # empty: ready, as long as the engine lives
        self.under_way = UnderWay()
        self._engine = engine
        self.pulse = Pulse(engine.beat, within=config.hang_seconds)
        self._watchers: list[asyncio.Task[None]] = []

    @property
    def why_not_ready(self) -> str:
        """Empty where requests are taken."""
        return self.not_ready or self.why_not_healthy

    @property
    def why_not_healthy(self) -> str:
        """Empty where its engine works; else only a new start helps."""
        if self._engine.is_dead:
            return "its engine ended"
        return "its engine hangs" if self.pulse.hangs else ""

    def close(self, why: str) -> None:
        """Take no new requests from now on."""
        self.not_ready = why

    async def blocking(self, function: Callable[..., T], *args: Any) -> T:
        """Run a blocking function on one of our own threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def _fetch(self, record: Record) -> Path:
        was_here, begin = await self.blocking(self.versions.is_here, record), time.perf_counter()
        path = await self.blocking(self.versions.fetch, record)
        if not was_here:
            self.telemetry.fetched(record, begin, time.perf_counter())
        if self.config.cache_limit is not None:
            # what was just fetched is the last used; what the engine holds need not be fetched for a restart
            keep = {*self.residency.digests, record.digest}
            try:
                await self.blocking(self.versions.trim, self.config.cache_limit, keep)
            except StorageError as error:
                log.warning("the cache cannot be trimmed: %s", error)
        return path

    async def ensure(self, record: Record) -> None:
        """Load a version, within the time of a request and its tenant's limit. Raises AdapterHubError."""
        owner = self.access.directory.tenants.get(record.name.tenant)
        if owner is not None and owner.limits.adapters is not None:
            await self.residency.make_room(record, most=owner.limits.adapters)
        await self.residency.ensure(record, within=self.config.load_seconds)

    def watch(self) -> None:
        """Start to watch registry and keys. A watcher that ends takes readiness with it: yanks would not arrive."""
        config = self.config
        watched = {
            "the registry": self.rollout.watch(poll_seconds=config.poll_seconds, rescan_seconds=config.rescan_seconds)
        }
        watched["the engine"] = self.pulse.watch()
        watched["the working set"] = self._keep_working_set()
        if self.webhook is not None:
            watched["the webhook"] = self.webhook.deliver()
        if config.prompts is not None:
            watched["candidates"] = try_again(self._score_candidates, seconds=config.score_seconds)
        watched["the size of the cache"] = gauges.watch_cache(self)
        if self.telemetry.metering is not None:
            watched["usage"] = self.telemetry.metering.watch()
        if self.access.needs_keys:
            watched["tenants and keys"] = self.access.watch(poll_seconds=config.poll_seconds)
        for what, watching in watched.items():
            task = asyncio.create_task(watching, name=f"watch {what}")
            task.add_done_callback(partial(self._watch_ended, what))
            self._watchers.append(task)

    def _watch_ended(self, what: str, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.not_ready = f"the watcher of {what} ended"
            log.error("the watcher of %s ended", what, exc_info=task.exception())

    async def restore(self) -> None:
        """Load what this replica held before it was restarted, while there is room: pins first, then the last used."""
        kept = await self.blocking(workingset.read, self._working_set_path)
        for text in kept.pins:
            await self._restore_pin(text)
        for text in reversed(kept.versions):
            if self.residency.places.is_full:
                break
            await self._restore(text, load=True)
        for text in kept.references:
            await self._restore(text, load=False)

    async def _restore_pin(self, text: str) -> None:
        """A pin stays while the registry is away; it ends with its version."""
        try:
            self.residency.places.pin(text)
            await self.rollout.current(AdapterRef.parse(text))
        except Conflict as error:
            log.warning("%s", error)
            return
        except (NotFound, Gone, InvalidName):
            self.residency.places.unpin(text)
        except AdapterHubError as error:
            log.warning("%s stays pinned, and cannot be loaded now: %s", text, error)
            return
        await self._restore(text, load=True)

    async def _restore(self, text: str, *, load: bool) -> None:
        try:
            version = await self.rollout.current(AdapterRef.parse(text))
            if load:
                await self.residency.ensure(version.record)
        except AdapterHubError as error:
            log.info("%s was in use before, and is not taken up again: %s", text, error)

    def working_set(self) -> WorkingSet:
        resident = self.residency.places.resident
        in_use = [str(p.ref) for p in self.rollout.pointers if str(p.ready.main.record.ref) in resident]
        return WorkingSet(versions=resident, references=tuple(in_use), pins=self.residency.places.pins)

    async def _keep_working_set(self) -> None:
        """Restore it, then write it down as it changes."""
        await self.restore()
        written, failed = None, False
        while True:
            present = self.working_set()
            if present != written:
                try:
                    await self.blocking(workingset.write, self._working_set_path, present)
                    written, failed = present, False
                except StorageError as error:
                    if not failed:
                        log.warning("what is loaded cannot be written down for the next start: %s", error)
                    failed = True
            await asyncio.sleep(self.config.poll_seconds)

    async def _score_candidates(self) -> None:
        for pointer in self.rollout.pointers:
            if pointer.ready.candidate is not None:
                await self.trials.score_again(pointer.ref, pointer.ready)

    async def poll(self) -> None:
        """Look at the registry now; returns when what moved is served. Raises StorageError."""
        await self.rollout.rescan()
        await self.rollout.settle()

    async def models(self, caller: Caller) -> list[dict[str, Any]]:
        """The adapters that a caller may name, in the shape of ``GET /v1/models``."""
        try:
            return await self.blocking(list_models, self.registry, self.versions.unfit, caller)
        except AdapterHubError as error:
            log.warning("the registry cannot be listed, only what is in use is shown: %s", error)
            in_use = [p for p in self.rollout.pointers if p.refusal is None and caller.may_use(p.ref.name)]
            return [card(str(p.ref), p.ready.main.record) for p in in_use]

    def state(self) -> dict[str, Any]:
        """What ``GET /adapterhub/state`` says."""
        places = self.residency.places
        return {
            "ready": not self.why_not_ready,
            "not_ready": self.why_not_ready or None,
            "base": {"name": self.config.base_name, "content": self.base.fingerprint.content},
            "max_loras": self.config.max_loras,
            "max_cpu_loras": self.config.max_cpu_loras,
            "max_lora_rank": self.config.max_lora_rank,
            "resident": [{"model": name, "leases": places.leases(name)} for name in places.resident],
            "references": [
                {
                    "reference": str(p.ref),
                    "ready": str(p.ready.main.record.ref),
                    "digest": p.ready.main.record.digest,
                    "wanted": str(p.wanted.main.record.ref),
                    "shares": {str(version.record.version): weight for version, weight in p.ready.shares},
                    "trial": self.trials.counts(p.ref, p.ready) or None,
                    "score": self.trials.score_of(p.ref, p.ready),
                    "refused": str(p.refusal) if p.refusal else None,
                    "problem": p.problem or None,
                }
                for p in self.rollout.pointers
            ],
        }


def _webhook(config: ServeConfig) -> Webhook | None:
    if config.webhook is None:
        return None
    return Webhook(config.webhook, secret=config.webhook_secret, server=f"{config.host}:{config.port}")
