"""How a candidate does beside the stable version on this replica, and whether it is to go back.

`verdict` is the rule, over the last answers of both. `Trials` counts them, and carries a rollback out as one move of
the channel from the move that was judged: where another replica or a person was first, there is nothing left to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import statistics
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from adapterhub.errors import AdapterHubError, Conflict, RequirementUnmet
from adapterhub.refs import AdapterRef
from adapterhub.registry.base import Registry, Version
from adapterhub.registry.views.rollouts import Gates
from adapterhub.serving.rollout.deployment import Deployment

log = logging.getLogger(__name__)

WHO = "ah serve"  # in the channel's log
_REMEMBERED = 500  # answers of each version
BROKEN = b'data: {"error"'  # how vLLM tells of an error inside a stream

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Blocking = Callable[..., Awaitable[Any]]


async def _unscored(version: Version) -> float | None:
    """Where there are no prompts at all."""
    return None


@dataclass
class Tally:
    """The last answers of one version: whether each failed, and the seconds to its first byte."""

    failed: deque[bool] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def add(self, *, failed: bool, seconds: float | None) -> None:
        self.failed.append(failed)
        if seconds is not None and not failed:
            self.seconds.append(seconds)

    @property
    def error_rate(self) -> float:
        return sum(self.failed) / len(self.failed) if self.failed else 0.0

    @property
    def first_byte(self) -> float | None:
        """Median, in seconds."""
        return statistics.median(self.seconds) if self.seconds else None


def verdict(candidate: Tally, stable: Tally, gates: Gates) -> str:
    """Why the candidate must go back; empty while it need not.

    A fault that both share (the engine, the clients) is none of the candidate's.
    """
    answers = len(candidate.failed)
    if answers >= gates.min_requests and candidate.error_rate > max(gates.max_error_rate, stable.error_rate):
        return f"{sum(candidate.failed)} of its last {answers} requests failed"
    if min(len(candidate.seconds), len(stable.seconds)) < gates.min_requests:
        return ""
    slow, usual = candidate.first_byte, stable.first_byte
    if slow is not None and usual is not None and slow > gates.max_slowdown * usual:
        return f"its first byte comes after {slow:.3g} s, that of the stable version after {usual:.3g} s"
    return ""


def score_verdict(score: float, gates: Gates) -> str:
    """Why a candidate with this score must go back; empty where it need not."""
    if gates.min_score is None or score >= gates.min_score:
        return ""
    return f"it scores {score:.3g} on the prompts for it, and {gates.min_score:g} are asked"


class Sample:
    """One answer while it is made. Counted once, where it says something about the version."""

    def __init__(self, count: Callable[[bool, float | None], None], clock: Callable[[], float]) -> None:
        self._count: Callable[[bool, float | None], None] | None = count
        self._clock = clock
        self._since: float | None = None
        self._seconds: float | None = None
        self._status = 0
        self._broke = False

    def fail(self) -> None:
        """The version could not even be loaded, or the engine broke off."""
        self._broke = True
        self.end()

    def end(self) -> None:
        """The last byte. A client that left before the first one, and a client's own mistake, say nothing."""
        if self._count is not None and (self._broke or self._status >= 500 or self._status == 200):
            self._count(self._broke or self._status >= 500, self._seconds)
        self._count = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self.fail()
        elif error is None:
            self.end()

    def watching(self, send: Send) -> Send:
        """From now on the engine has the request."""
        self._since = self._clock()

        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
            elif body := message.get("body"):
                if self._seconds is None and self._since is not None:
                    self._seconds = self._clock() - self._since
                self._broke = self._broke or body.startswith(BROKEN)
            await send(message)

        return sending


class Trials:
    """The trials that run on this replica. One event loop; not for threads."""

    def __init__(
        self,
        registry: Registry,
        *,
        blocking: Blocking,
        moved: Callable[[], Awaitable[None]],
        clock: Callable[[], float],
        score: Callable[[Version], Awaitable[float | None]] = _unscored,
    ) -> None:
        """``moved`` is told after a rollback, so that it is followed at once; ``clock`` in seconds.

        ``score`` asks a version the prompts for its adapter: from 0 to 1, None where there are none.
        """
        self._registry = registry
        self._blocking = blocking
        self._moved = moved
        self._clock = clock
        self._score = score
        self._scores: dict[tuple[AdapterRef, int], float] = {}  # of the candidate, the last time
        self._tallies: dict[tuple[AdapterRef, int], dict[int, Tally]] = {}
        self._decisions: dict[AdapterRef, asyncio.Task[None]] = {}

    def sample(self, ref: AdapterRef, deployment: Deployment, version: Version) -> Sample | None:
        """For one request; None where nothing is on trial."""
        if deployment.stable is None:
            return None
        tally = self._of(ref, deployment)[version.record.version]

        def count(failed: bool, seconds: float | None) -> None:
            tally.add(failed=failed, seconds=seconds)
            self._judge(ref, deployment)

        return Sample(count, self._clock)

    def counts(self, ref: AdapterRef, deployment: Deployment) -> dict[str, dict[str, Any]]:
        """Version → requests, failed, median seconds to the first byte."""
        tallies = self._tallies.get((ref, deployment.seq), {})
        return {
            str(number): {"requests": len(t.failed), "failed": sum(t.failed), "first_byte_seconds": t.first_byte}
            for number, t in tallies.items()
        }

    async def approve(self, ref: AdapterRef, deployment: Deployment) -> None:
        """Score a candidate before it gets callers, where its gates ask for that.

        Raises RequirementUnmet for one that scores too little; its rollback is under way then.
        """
        gates, candidate = deployment.gates, deployment.candidate
        if gates is None or gates.min_score is None or candidate is None or (ref, deployment.seq) in self._scores:
            return
        version = next(v for v in deployment.versions if v.record.version == candidate)
        score = await self._score(version)
        if score is None:
            log.warning("%s has no prompts here: --min-score is not looked at", ref)
            return
        self._scores = {key: value for key, value in self._scores.items() if key[0] != ref}
        self._scores[ref, deployment.seq] = score
        log.info("%s scores %.3g on the prompts for it", version.record.ref, score)
        if why := score_verdict(score, gates):
            self._send_back(ref, deployment, why)
            raise RequirementUnmet(f"{version.record.ref} gets no callers", why=why)

    async def score_again(self, ref: AdapterRef, deployment: Deployment) -> None:
        """While a candidate has callers: its answers may change with what surrounds it. Raises AdapterHubError."""
        self._scores.pop((ref, deployment.seq), None)
        with contextlib.suppress(RequirementUnmet):  # it goes back
            await self.approve(ref, deployment)

    def score_of(self, ref: AdapterRef, deployment: Deployment) -> float | None:
        """The candidate's, the last time that it was asked."""
        return self._scores.get((ref, deployment.seq))

    async def settle(self) -> None:
        """Wait for the rollbacks that are under way."""
        await asyncio.gather(*self._decisions.values())

    def _of(self, ref: AdapterRef, deployment: Deployment) -> dict[int, Tally]:
        key = (ref, deployment.seq)
        if key not in self._tallies:
            for old in [k for k in self._tallies if k[0] == ref and k[1] < deployment.seq]:
                del self._tallies[old]
            self._tallies[key] = {version.record.version: Tally() for version in deployment.versions}
        return self._tallies[key]

    def _judge(self, ref: AdapterRef, deployment: Deployment) -> None:
        tallies = self._tallies.get((ref, deployment.seq))
        stable, gates = deployment.stable, deployment.gates
        if tallies is None or stable is None or gates is None or deployment.candidate is None:
            return
        if why := verdict(tallies[deployment.candidate], tallies[stable.record.version], gates):
            self._send_back(ref, deployment, why)

    def _send_back(self, ref: AdapterRef, deployment: Deployment, why: str) -> None:
        if ref in self._decisions or deployment.stable is None:
            return
        log.warning("%s goes back from version %d: %s", ref, deployment.candidate, why)
        going = self._go_back(ref, deployment, deployment.stable.record.version, why)
        task = self._decisions[ref] = asyncio.create_task(going, name=f"roll {ref} back")
        task.add_done_callback(lambda _: self._decisions.pop(ref))

    async def _go_back(self, ref: AdapterRef, deployment: Deployment, to: int, why: str) -> None:
        """Tried again at the next answer where the registry is away."""

        def rollback() -> None:
            assert ref.channel is not None
            why_text = f"version {deployment.candidate}: {why}"
            self._registry.rollback(ref.name, ref.channel, to=to, who=WHO, why=why_text, expected=deployment.seq)

        try:
            await self._blocking(rollback)
        except Conflict:
            log.info("%s was moved by somebody else meanwhile", ref)
        except AdapterHubError as error:
            log.error("%s cannot be rolled back: %s", ref, error)
            return
        try:
            await self._moved()
        except AdapterHubError as error:
            log.warning("%s was rolled back, and is followed at the next poll: %s", ref, error)
