"""`ah eval`: adapters and versions beside their base, on rows that they were not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterhub.cli.output import BaseOption, JsonOption, RegistryOption, print_json, print_table, say
from adapterhub.errors import InvalidName, NotFound, UsageError
from adapterhub.manifest import Record
from adapterhub.refs import AdapterRef
from adapterhub.registry import Cache, open_registry
from adapterhub.runrecord import ADAPTER, FILE
from adapterhub.settings import load_settings

if TYPE_CHECKING:
    from adapterhub.registry import Registry
    from adapterhub.trainers.evaluate import Metrics, Subject


@dataclass(frozen=True)
class Found:
    """What was named on the command line."""

    label: str
    adapter: Path
    record: Record | None = None  # of a version
    base: str | None = None  # that it was trained on, where that is known


def evaluate(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="RUN|DIR|TENANT/ADAPTER[@VERSION]…", help="What to evaluate, each beside the base."),
    ],
    data: Annotated[list[Path], typer.Option("--data", metavar="JSONL", help="Rows; may be repeated.")],
    base: BaseOption = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            "--score",
            metavar="SCORER",
            help="Answer each row and score it: exact_match, json, tool_name, tool_call, regex:PATTERN, FILE.py:NAME.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens an answer at most.")] = 256,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first rows.")] = None,
    suite: Annotated[str | None, typer.Option("--suite", help="Its name in the log; default: the data's.")] = None,
    record: Annotated[
        bool, typer.Option("--record/--no-record", help="Keep the result with the versions that were evaluated.")
    ] = True,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate adapters and versions beside their base: loss, perplexity, and scores of their answers."""
    from adapterhub.scorers import scorer
    from adapterhub.trainers.evaluate import BASE, Subject, prepare_evaluation

    settings = load_settings()
    registry = open_registry(registry_url or settings.registry)
    scorers = [scorer(written) for written in score or []]
    found = [find(written, registry) for written in adapters]
    name = base_of(base or settings.base, found)
    prepared = prepare_evaluation(name, data, adapter=found[0].adapter, limit=limit)
    _check_base(prepared.base, found)
    subjects = [Subject(BASE), *(Subject(f.label, f.adapter) for f in found)]
    scored = measured(prepared, subjects, scorers=scorers, max_new_tokens=max_tokens)
    versions = [f for f in found if f.record is not None and record]
    for one in versions:
        keep(registry, one.record, scored, suite=suite or data[0].stem, prepared=prepared, who=settings.author)
    if as_json:
        print_json({"rows": len(prepared.train.examples), "scores": {k: dict(v) for k, v in scored.items()}})
        return
    metrics = list(next(iter(scored.values())))
    print_table(("", *metrics), [(who, *(f"{m[name]:.4f}" for name in metrics)) for who, m in scored.items()])
    for one in versions:
        say(f"kept with {one.label}: ah show {one.label}")


def find(written: str, registry: Registry) -> Found:
    """A run folder, an adapter directory, or a version, whose files are fetched and verified."""
    folder = Path(written)
    if folder.is_dir():
        if not (folder / FILE).is_file():
            return Found(written, folder)
        from adapterhub.trainers import read_config, read_yaml
        from adapterhub.trainers.run import RESOLVED

        resolved = folder / RESOLVED
        known = read_config(read_yaml(resolved)).config.base_model if resolved.is_file() else None
        return Found(written, folder / ADAPTER, base=known)
    try:
        ref = AdapterRef.parse(written)
    except InvalidName as error:
        raise NotFound(
            f"{written} is neither a folder nor a version", why=error.what, hint="name a run, or acme/support@3"
        ) from error
    record = registry.resolve(ref).record
    base = record.manifest.base.name if record.manifest.base else None
    return Found(str(record.ref), Cache(load_settings().cache, registry).fetch(record), record, base)


def base_of(asked: str | None, found: Sequence[Found]) -> str:
    if asked is not None:
        return asked
    recorded = next((f.base for f in found if f.base), None)
    if recorded is None:
        raise UsageError("an evaluation needs the base", why="neither --base nor $AH_BASE names one", hint="--base DIR")
    return recorded


def _check_base(base: Any, found: Sequence[Found]) -> None:
    from adapterhub import peftdir

    for one in found:
        base.check_factors(peftdir.read(one.adapter))
        if one.record is not None and one.record.manifest.base is not None:
            note = base.check(one.record.manifest.base, what=one.label)
            if note:
                say(f"note: {note}")


def measured(
    prepared: Any,
    subjects: Sequence[Subject],
    *,
    scorers: Sequence[tuple[str, Callable[[str, str], float]]] = (),
    max_new_tokens: int = 256,
) -> dict[str, Metrics]:
    """`trainers.evaluate`, with its progress on stderr."""
    from adapterhub.cli.progress import shown
    from adapterhub.trainers.evaluate import evaluate as run

    with shown() as listener:
        return dict(
            run(prepared, subjects, scorers=scorers, max_new_tokens=max_new_tokens, on_event=listener),
        )


def keep(
    registry: Registry, record: Record | None, scored: dict[str, Metrics], *, suite: str, prepared: Any, who: str
) -> None:
    """Add to the version's log of evaluations: its own metrics, and beside them those of the others."""
    assert record is not None
    files = prepared.evaluation.files
    registry.add_evaluation(
        record.name,
        record.version,
        suite=suite,
        metrics=scored[str(record.ref)],
        details={
            "others": {label: dict(metrics) for label, metrics in scored.items() if label != str(record.ref)},
            "base": prepared.base.name,
            "rows": len(prepared.evaluation.examples),
            "data_sha256": [file.sha256 for file in files],
        },
        who=who,
    )
