"""`ah eval`: adapters and versions beside their base, on rows that they were not trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    from adapterhub.trainers.evaluation.evaluate import Metrics, Subject
    from adapterhub.trainers.evaluation.lmtasks import Asking


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
    data: Annotated[list[Path] | None, typer.Option("--data", metavar="JSONL", help="Rows; may be repeated.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="TASK,…", help="Tasks of lm-evaluation-harness: gsm8k,hellaswag."),
    ] = None,
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
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first rows, or of each task.")] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="A folder of task files of your own.")
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="Examples before each question of a task.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask the tasks through the chat template.")
    ] = False,
    suite: Annotated[
        str | None, typer.Option("--suite", help="Its name in the log; default: the data's, or the tasks'.")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record/--no-record", help="Keep the result with the versions that were evaluated.")
    ] = True,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate adapters and versions beside their base: loss, perplexity, scores of their answers, named tasks."""
    from adapterhub.trainers.evaluation.evaluate import BASE, Subject
    from adapterhub.trainers.evaluation.lmtasks import Asking

    _check_flags(data, tasks, of_data={"--score": score}, of_tasks={"--include-path": include_path,
                 "--num-fewshot": few_shot, "--apply-chat-template": chat or None})  # fmt: skip
    settings = load_settings()
    registry = open_registry(registry_url or settings.registry)
    found = [find(written, registry) for written in adapters]
    name = base_of(base or settings.base, found)
    subjects = [Subject(BASE), *(Subject(f.label, f.adapter) for f in found)]
    if tasks:
        asking = Asking(include=include_path, limit=limit, few_shot=few_shot, chat=chat)
        scored, details = _of_tasks(name, found, subjects, tasks, asking)
    else:
        scored, details = _of_rows(name, found, subjects, data or [], score or [], limit=limit, max_tokens=max_tokens)
    versions = [f for f in found if f.record is not None and record]
    called = suite or tasks or (data or [Path()])[0].stem
    for one in versions:
        keep(registry, one.record, scored, suite=called, details=details, who=settings.author)
    if as_json:
        counted = {"rows": details["rows"]} if "rows" in details else {"tasks": details["tasks"]}
        print_json(counted | {"scores": {k: dict(v) for k, v in scored.items()}})
        return
    _print_scores(scored, across=not tasks)
    for one in versions:
        say(f"kept with {one.label}: ah show {one.label}")


def _check_flags(
    data: list[Path] | None, tasks: str | None, *, of_data: Mapping[str, Any], of_tasks: Mapping[str, Any]
) -> None:
    if bool(data) == bool(tasks):
        raise UsageError(
            "an evaluation needs rows or tasks" if not data else "--data and --tasks are two evaluations",
            why="--data names rows, --tasks what lm-evaluation-harness asks",
            hint="--data heldout.jsonl, or --tasks gsm8k",
        )
    for flag, value in (of_data if tasks else of_tasks).items():
        if value is not None:
            raise UsageError(f"{flag} has no effect on {'tasks' if tasks else 'rows'}", hint=f"leave {flag} out")


def _of_rows(
    base: str,
    found: Sequence[Found],
    subjects: Sequence[Subject],
    data: Sequence[Path],
    score: Sequence[str],
    *,
    limit: int | None,
    max_tokens: int,
) -> tuple[dict[str, Metrics], dict[str, Any]]:
    from adapterhub.scorers import scorer
    from adapterhub.trainers.evaluation.evaluate import prepare_evaluation

    scorers = [scorer(written) for written in score]
    prepared = prepare_evaluation(base, data, adapter=found[0].adapter, limit=limit)
    _check_base(prepared.base, found)
    return measured(prepared, subjects, scorers=scorers, max_new_tokens=max_tokens), details_of(prepared)


def _of_tasks(
    base: str, found: Sequence[Found], subjects: Sequence[Subject], tasks: str, asking: Asking
) -> tuple[dict[str, Metrics], dict[str, Any]]:
    from adapterhub.base import find_base
    from adapterhub.cli.progress import shown
    from adapterhub.trainers.evaluation.lmtasks import evaluate_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    model = find_base(base)
    _check_base(model, found)
    with shown() as listener:
        scored = evaluate_tasks(model, subjects, names, asking=asking, on_event=listener)
    how = {"limit": asking.limit, "num_fewshot": asking.few_shot, "chat_template": asking.chat}
    return dict(scored), {"base": model.name, "tasks": names, **how}


def _print_scores(scored: Mapping[str, Metrics], *, across: bool) -> None:
    """A line a subject; of tasks, whose metrics have long names, a line a metric."""
    metrics = list(next(iter(scored.values())))
    if across:
        print_table(("", *metrics), [(who, *(f"{m[name]:.4f}" for name in metrics)) for who, m in scored.items()])
        return
    print_table(("", *scored), [(name, *(f"{m[name]:.4f}" for m in scored.values())) for name in metrics])


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
    """`trainers.evaluation.evaluate`, with its progress on stderr."""
    from adapterhub.cli.progress import shown
    from adapterhub.trainers.evaluation.evaluate import evaluate as run

    with shown() as listener:
        return dict(
            run(prepared, subjects, scorers=scorers, max_new_tokens=max_new_tokens, on_event=listener),
        )


def details_of(prepared: Any) -> dict[str, Any]:
    """What was measured on, for `keep`."""
    return {
        "base": prepared.base.name,
        "rows": len(prepared.evaluation.examples),
        "data_sha256": [file.sha256 for file in prepared.evaluation.files],
    }


def keep(
    registry: Registry,
    record: Record | None,
    scored: Mapping[str, Metrics],
    *,
    suite: str,
    details: Mapping[str, Any],
    who: str,
) -> None:
    """Add to the version's log of evaluations: its own metrics, and beside them those of the others."""
    assert record is not None
    others = {label: dict(metrics) for label, metrics in scored.items() if label != str(record.ref)}
    registry.add_evaluation(
        record.name,
        record.version,
        suite=suite,
        metrics=scored[str(record.ref)],
        details={"others": others, **details},
        who=who,
    )
