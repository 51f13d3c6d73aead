"""Which versions a search means. No I/O.

text      every word is in the name, base, method, author, labels, channels or status
rank      16, ">=16", "<64"
metric    "eval_loss<1.5", "heldout.accuracy>=0.8": of the training, or of the newest evaluation of a suite
label     "team=x", or "team" for any value
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from adapterhub.errors import UsageError
from adapterhub.registry.base import Overview, Status, Summary

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
_COMPARISON = re.compile(r"(?P<what>[^<>=!]*?)\s*(?P<sign><=|>=|!=|==|<|>|=)\s*(?P<value>[^<>=!]+)")


@dataclass(frozen=True)
class Comparison:
    """``what`` against a number: ``eval_loss < 1.5``."""

    what: str
    sign: str
    value: float

    def holds(self, found: float) -> bool:
        return _OPERATORS[self.sign](found, self.value)


@dataclass(frozen=True)
class Query:
    """All of these must hold."""

    words: tuple[str, ...] = ()
    base: str = ""
    ranks: tuple[Comparison, ...] = ()
    metrics: tuple[Comparison, ...] = ()
    labels: Mapping[str, str | None] = field(default_factory=dict)  # None: any value
    statuses: tuple[Status, ...] = ("active", "deprecated")


@dataclass(frozen=True)
class Hit:
    """A version that a query means, and the channels that point at it."""

    summary: Summary
    channels: tuple[str, ...]


def comparison(text: str, *, bare: str = "") -> Comparison:
    """Read ``eval_loss<1.5``; where ``bare`` names what is compared also ``>=16`` and ``16``. Raises UsageError."""
    match = _COMPARISON.fullmatch(text.strip())
    what, sign, value = (match["what"].strip(), match["sign"], match["value"]) if match else ("", "=", text)
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if number != number or (not bare and not what) or (bare and what not in {"", bare}):
        raise UsageError(
            f"{text!a} compares nothing with a number",
            why=f"a {bare} is written like 16 or '>=16'" if bare else "a metric is written like 'eval_loss<1.5'",
            hint=f"ah search --{bare or 'metric'} '{'>=16' if bare else 'eval_loss<1.5'}'",
        )
    return Comparison(what or bare, "=" if sign == "==" else sign, number)


def search(overviews: Iterable[Overview], query: Query) -> list[Hit]:
    """By name, then newest version first."""
    return [hit for overview in sorted(overviews, key=lambda o: o.name) for hit in _hits(overview, query)]


def _hits(overview: Overview, query: Query) -> Iterator[Hit]:
    for summary in overview.versions:
        channels = (c for c, targets in overview.channels.items() if summary.version in {t.version for t in targets})
        hit = Hit(summary, tuple(channels))
        if _means(query, hit):
            yield hit


def _means(query: Query, hit: Hit) -> bool:
    found = hit.summary
    return (
        found.status in query.statuses
        and query.base.lower() in found.base.lower()
        and all(rank.holds(found.rank) for rank in query.ranks)
        and all(_measured(metric, found) for metric in query.metrics)
        and all(k in found.labels and v in {None, found.labels[k]} for k, v in query.labels.items())
        and all(word.lower() in _text(hit) for word in query.words)
    )


def metrics_of(found: Summary) -> dict[str, float]:
    """Of the training by their own names, of evaluations as ``suite.metric``."""
    evaluated = {f"{suite}.{metric}": v for suite, its in found.evaluations.items() for metric, v in its.items()}
    return {**found.metrics, **evaluated}


def _measured(metric: Comparison, found: Summary) -> bool:
    value = metrics_of(found).get(metric.what)
    return value is not None and metric.holds(value)


def _text(hit: Hit) -> str:
    found = hit.summary
    labels = (f"{key}={value}" for key, value in found.labels.items())
    said = (f"{found.name}@{found.version}", found.base, found.method, found.author, found.status, found.digest)
    return "\n".join((*said, *labels, *hit.channels)).lower()
