"""What a version must reach before it is published: ``eval_loss < base``.

    requirement  =  comparison { "and" comparison }
    comparison   =  METRIC OP term [ "*" NUMBER ]
    term         =  NUMBER | "base" | REF          base, or a version: the same metric of it
    OP           =  < | <= | > | >= | ==

Nothing of it is ever run as code.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from adapterhub.errors import UsageError

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt
}  # fmt: skip
_COMPARISON = re.compile(
    r"\s*(?P<metric>[A-Za-z_]\w*)\s*(?P<op><=|>=|==|<|>)\s*(?P<term>[^\s*]+)\s*(?:\*\s*(?P<factor>[0-9.eE+-]+)\s*)?"
)


@dataclass(frozen=True)
class Comparison:
    """One metric beside a number, or beside the same metric of something else."""

    metric: str
    op: str
    term: float | str
    factor: float = 1.0

    def __str__(self) -> str:
        term = f"{self.term:g}" if isinstance(self.term, float) else self.term
        return f"{self.metric} {self.op} {term}" + (f" * {self.factor:g}" if self.factor != 1 else "")


def parse_requirement(text: str) -> tuple[Comparison, ...]:
    """Raises UsageError for what is outside the grammar."""
    return tuple(_comparison(part, text) for part in re.split(r"\band\b", text))


def unmet(
    requirement: tuple[Comparison, ...], ours: Mapping[str, float], others: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """The comparisons that do not hold, in words, with both sides.

    Raises UsageError for a metric that was not measured.
    """
    failed = []
    for one in requirement:
        left = _metric(one.metric, ours)
        right = one.term if isinstance(one.term, float) else _metric(one.metric, others[one.term])
        right *= one.factor
        if not _OPERATORS[one.op](left, right):
            failed.append(f"{one}: it is {left:.4g}, and the other side {right:.4g}")
    return failed


def _comparison(part: str, text: str) -> Comparison:
    match = _COMPARISON.fullmatch(part)
    try:
        if match is None:
            raise ValueError
        factor = float(match["factor"]) if match["factor"] else 1.0
        term: float | str = float(match["term"]) if re.match(r"[-+.\d]", match["term"]) else match["term"]
    except ValueError as error:
        raise UsageError(
            f"the requirement {text!a} cannot be read",
            why="it is METRIC < NUMBER, base or TENANT/ADAPTER@VERSION, joined by and",
            hint='--require "eval_loss < base"',
        ) from error
    return Comparison(match["metric"], match["op"], term, factor)


def _metric(name: str, metrics: Mapping[str, float]) -> float:
    if name not in metrics:
        raise UsageError(
            f"the metric {name!a} was not measured",
            why="there are " + ", ".join(metrics),
            hint="ask for a scorer with --score, or compare another metric",
        )
    return metrics[name]
