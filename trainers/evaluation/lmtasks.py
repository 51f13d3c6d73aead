"""Tasks of lm-evaluation-harness by name: gsm8k, hellaswag, or one of your own from a folder of YAML files.

    scored = evaluate_tasks(base, [Subject("base"), Subject("acme/support@3", folder)], ["gsm8k"])
    scored["acme/support@3"]["gsm8k.exact_match.strict-match"]

The harness asks and scores; the model is ours, loaded once, with one adapter after another on it.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.base import BaseModel
from adapterhub.errors import MissingDependency, RunFailed, UsageError
from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.evaluation.evaluate import Metrics, Subject, wearing
from adapterhub.trainers.events import Listener, Stage, ignore
from adapterhub.trainers.labels.examples import Examples
from adapterhub.trainers.labels.splits import Split
from adapterhub.trainers.labels.tokenizer import load_tokenizer
from adapterhub.trainers.model import load_model
from adapterhub.trainers.prepare import Prepared
from adapterhub.trainers.quiet import quiet


@dataclass(frozen=True)
class Asking:
    """How tasks are asked. ``limit``: documents of a task; ``few_shot``: examples before each; None: the task's own."""

    include: Path | None = None  # a folder of task files, beside the harness's own
    limit: int | None = None
    few_shot: int | None = None
    chat: bool = False  # through the chat template
    batch: int = 8


def evaluate_tasks(
    base: BaseModel,
    subjects: Sequence[Subject],
    tasks: Sequence[str],
    *,
    asking: Asking | None = None,
    on_event: Listener = ignore,
) -> Mapping[str, Metrics]:
    """Metrics by the subjects' labels, each named TASK.METRIC, and TASK.METRIC.FILTER where the task has filters.

    Raises:
        MissingDependency: the ``lm-eval`` extra is not installed.
        UsageError: a task that there is not.
        AdapterError: an adapter that does not load on this base.
        RunFailed: a task whose data cannot be had, or whatever broke below us.
    """
    asking = asking or Asking()
    with quiet(None):
        known = _known(asking.include)
        _check(tasks, known)
        on_event(Stage(f"loading {base.name}"))
        prepared = _bare(base)
        scored: dict[str, Metrics] = {}
        try:
            model = load_model(prepared).eval()
            for subject in subjects:
                on_event(Stage(f"asking {subject.label} the tasks {', '.join(tasks)}"))
                with wearing(model, subject) as measured:
                    scored[subject.label] = _asked(measured, prepared.tokenizer, tasks, known, asking)
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            logging.getLogger(__name__).exception("a task broke off")
            raise RunFailed(
                "the tasks broke off",
                why=f"{type(error).__name__}: {error}".strip().splitlines()[0],
                hint="a task loads its data from the Hub, unless its file names others",
            ) from error
    return scored


def _known(include: Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependency(
            "tasks by name need lm-evaluation-harness", why=str(error), hint='pip install "adapterhub[lm-eval]"'
        ) from error
    if include is not None and not include.is_dir():
        raise UsageError(f"--include-path {include} is not a folder", why="it holds the YAML files of your tasks")
    return TaskManager(include_path=str(include) if include else None)


def _check(tasks: Sequence[str], known: Any) -> None:
    for task in tasks:
        if task not in known.all_tasks:
            close = difflib.get_close_matches(task, known.all_tasks, n=1, cutoff=0.6)
            raise UsageError(
                f"there is no task {task!a}",
                why=f"did you mean {close[0]}?" if close else "neither the harness nor --include-path has it",
                hint="lm-eval ls tasks",
            )


def _bare(base: BaseModel) -> Prepared:
    """The base without rows: all that the model is loaded from."""
    config = TrainConfig(base_model=str(base.path), datasets=())
    nothing = Split((), Examples())
    return Prepared(config, base, load_tokenizer(base, config), None, nothing, None, 0, ())


def _asked(model: Any, tokenizer: Any, tasks: Sequence[str], known: Any, asking: Asking) -> dict[str, float]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=asking.batch),
        tasks=list(tasks),
        task_manager=known,
        num_fewshot=asking.few_shot,
        limit=asking.limit,
        apply_chat_template=asking.chat,
        bootstrap_iters=0,
        log_samples=False,
    )
    return dict(_named((found or {}).get("results", {})))


def _named(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """The harness writes ``{"gsm8k": {"exact_match,strict-match": 0.2, "exact_match_stderr,strict-match": …}}``."""
    for task, metrics in results.items():
        for written, value in metrics.items():
            metric, _, how = written.partition(",")
            if isinstance(value, int | float) and math.isfinite(value) and how and not metric.endswith("_stderr"):
                yield ".".join((task, metric) if how == "none" else (task, metric, how)), round(float(value), 6)
