"""`ah publish --require`: an adapter is evaluated before it is published, and refused where it falls short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub.cli.evaluate import base_of, details_of, find, keep, measured
from adapterhub.cli.output import say
from adapterhub.errors import RequirementUnmet, UsageError
from adapterhub.manifest import Record
from adapterhub.registry import Registry
from adapterhub.scorers import scorer
from adapterhub.trainers.evaluation.evaluate import BASE, Subject, prepare_evaluation
from adapterhub.trainers.evaluation.requirement import parse_requirement, unmet
from adapterhub.trainers.run import RESOLVED

SUITE = "publish"
_OURS = "the adapter"


@dataclass(frozen=True)
class Gate:
    """What was measured before publishing."""

    scored: Mapping[str, Mapping[str, float]]
    prepared: Any

    def keep(self, registry: Registry, record: Record, *, who: str) -> None:
        """As the first evaluation of the version that it became."""
        scored = {str(record.ref) if label == _OURS else label: metrics for label, metrics in self.scored.items()}
        keep(registry, record, scored, suite=SUITE, details=details_of(self.prepared), who=who)


def passed(
    folder: Path,
    written: Sequence[str],
    *,
    registry: Registry,
    base: str | None,
    data: Sequence[Path],
    score: Sequence[str],
) -> Gate:
    """Evaluate, and compare.

    Raises:
        RequirementUnmet: a comparison does not hold; nothing is published.
        UsageError: a requirement or scorer that cannot be read, or no rows to evaluate on.
    """
    requirement = tuple(one for text in written for one in parse_requirement(text))
    scorers = [scorer(name) for name in score]
    mine = find(str(folder), registry)
    others = {term: find(term, registry) for c in requirement if isinstance(term := c.term, str) and term != BASE}
    prepared = _rows(folder, base or mine.base, data, mine.adapter)
    subjects = [Subject(BASE), Subject(_OURS, mine.adapter)]
    subjects += [Subject(term, other.adapter) for term, other in others.items()]
    scored = measured(prepared, subjects, scorers=scorers)
    failed = unmet(requirement, scored[_OURS], scored)
    if failed:
        raise RequirementUnmet(
            f"{folder} does not reach what is required",
            why="; ".join(failed),
            hint="train again, or publish without --require",
        )
    for one in requirement:
        say(f"required: {one}: holds, {scored[_OURS][one.metric]:.4g}")
    return Gate(scored, prepared)


def _rows(folder: Path, base: str | None, data: Sequence[Path], adapter: Path) -> Any:
    resolved = folder / RESOLVED
    if data:
        return prepare_evaluation(base_of(base, []), data, adapter=adapter)
    if not resolved.is_file():
        raise UsageError(
            f"--require has no rows to evaluate {folder} on", why="it is no run folder", hint="--eval-data eval.jsonl"
        )
    from adapterhub.trainers import prepare, read_config, read_yaml

    config = read_config(read_yaml(resolved)).config
    prepared = prepare(replace(config, base_model=base) if base else config)
    if prepared.evaluation is None:
        raise UsageError(
            f"--require has no rows to evaluate {folder} on",
            why="the run had no evaluation data",
            hint="--eval-data eval.jsonl",
        )
    return prepared
