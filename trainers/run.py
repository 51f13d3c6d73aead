"""One training, one folder: everything that a person or `ah publish` asks about it later.

runs/support-20260824-101500/
├── config.yml            as given            ├── metrics.jsonl   a line a step
├── config.resolved.yml   every default       ├── train.log       what the libraries said
├── keys.json             fate of each key    ├── curves.png
├── data.json             files, hashes       ├── report.html     one file, opens anywhere
├── checkpoints/          to go on from       ├── adapter/        what is published
└── run.json              written last: where it is, the training finished
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from adapterhub.errors import AlreadyExists, DataError, NotFound, StorageError
from adapterhub.manifest import Lineage
from adapterhub.runrecord import ADAPTER, FILE, TRAINING, RunRecord
from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.dialect import KeyFate, Reading, read_config, read_yaml
from adapterhub.trainers.events import Listener, Stage, ignore
from adapterhub.trainers.fit import Fitted, fit, last_checkpoint
from adapterhub.trainers.labels.splits import Split
from adapterhub.trainers.launch import launch
from adapterhub.trainers.lineage import data_hashes, portable
from adapterhub.trainers.onray import launch_on_ray
from adapterhub.trainers.prepare import Prepared, prepare
from adapterhub.trainers.report import write_report
from adapterhub.trainers.shortage import OutOfMemory, smaller_batch
from adapterhub.trainers.start import FindVersion

GIVEN, RESOLVED, KEYS, DATA = "config.yml", "config.resolved.yml", "keys.json", "data.json"
_PACKAGES = ("adapterhub", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")


@dataclass(frozen=True)
class Result:
    """A finished training."""

    folder: Path
    record: RunRecord
    fitted: Fitted
    dora: bool = False  # then it is for `ah export` alone

    @property
    def adapter(self) -> Path:
        return self.folder / ADAPTER

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.folder),
            "adapter": str(self.adapter),
            "name": str(self.record.name) if self.record.name else None,
            "steps": self.fitted.steps,
            "train_loss": self.fitted.train_loss,
            "eval_loss": None,
            **self.fitted.evaluation,
            "seconds": round(self.fitted.seconds, 2),
            "tokens": self.fitted.tokens,
            "tokens_per_second": round(self.fitted.tokens / max(self.fitted.seconds, 1e-9), 1),
        }


def train(reading: Reading, prepared: Prepared, *, on_event: Listener = ignore, auto_batch: bool = False) -> Result:
    """Train in a new run folder.

    Args:
        auto_batch: where memory runs out, go on with half the micro batch and twice the accumulation, as often as it
            takes: every step still sees the same rows.

    Raises:
        AlreadyExists: ``output_dir`` holds something already.
        RunFailed, Interrupted, StorageError: see `trainers.fit.fit`.
    """
    folder = run_folder(prepared.config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_beginning(folder, reading, prepared)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written", why=error.strerror or str(error)) from error
    return _finish(folder, prepared, reading.fates, on_event, resume=False, auto_batch=auto_batch)


def read_run(folder: Path, *, find_version: FindVersion | None = None) -> Prepared:
    """What a run that broke off was made of, to go on with `resume`. ``find_version`` as in `prepare`.

    Raises:
        NotFound: it is no run folder, or holds no checkpoint.
        AlreadyExists: the run is finished.
        DataError: a data file changed since.
    """
    if not (folder / RESOLVED).is_file():
        raise NotFound(f"{folder} is not a run folder", why=f"it has no {RESOLVED}", hint="ls runs")
    if (folder / FILE).is_file():
        raise AlreadyExists(f"the run {folder} is finished", hint=f"ah publish {folder}")
    if last_checkpoint(folder) is None:
        raise NotFound(
            f"the run {folder} has no checkpoint",
            why="it ended before the first one",
            hint=f"start again: ah train {folder / GIVEN}",
        )
    prepared = prepare(read_config(read_yaml(folder / RESOLVED)).config, find_version=find_version)
    recorded = json.loads((folder / DATA).read_bytes())
    for now, then in zip(_files(prepared), recorded["files"], strict=True):
        if now["sha256"] != then["sha256"]:
            raise DataError(
                f"{now['path']} is not what the run began with",
                why="going on with other data would mix two trainings",
                hint=f"bring it back, or start again: ah train {folder / GIVEN}",
            )
    return prepared


def resume(folder: Path, prepared: Prepared, *, on_event: Listener = ignore) -> Result:
    """Go on from the last checkpoint: the same loss curve as without the break. Raises as `train`."""
    fates = tuple(KeyFate(**entry) for entry in json.loads((folder / KEYS).read_bytes()))
    return _finish(folder, prepared, fates, on_event, resume=True)


def run_folder(config: TrainConfig) -> Path:
    """``output_dir``, or ``runs/NAME-TIME``. Raises AlreadyExists where it holds something."""
    name = config.name.adapter if config.name else "adapter"
    folder = Path(config.output_dir or f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        unfinished = (folder / RESOLVED).is_file() and not (folder / FILE).is_file()
        raise AlreadyExists(
            f"the run folder {folder} is not empty",
            why="a run never writes over another one",
            hint=f"ah train --resume {folder}" if unfinished else "name another with --out",
        )
    return folder


def _finish(
    folder: Path,
    prepared: Prepared,
    fates: Sequence[KeyFate],
    on_event: Listener,
    *,
    resume: bool,
    auto_batch: bool = False,
) -> Result:
    try:
        prepared, fitted = _fitted(folder, prepared, on_event, resume=resume, auto_batch=auto_batch)
    except KeyboardInterrupt:
        if last_checkpoint(folder) is None:  # nothing to go on from
            shutil.rmtree(folder, ignore_errors=True)
        raise
    on_event(Stage("writing the report"))
    record = _record(prepared, fitted)
    write_report(folder, prepared=prepared, fitted=fitted, fates=fates, environment=record.lineage.environment)
    (folder / ADAPTER / TRAINING).write_text(portable(prepared).to_yaml(), encoding="utf-8")
    record.write(folder / FILE)
    return Result(folder, record, fitted, dora=prepared.config.peft_use_dora)


def _fitted(
    folder: Path, prepared: Prepared, on_event: Listener, *, resume: bool, auto_batch: bool
) -> tuple[Prepared, Fitted]:
    while True:
        config = prepared.config
        smaller = smaller_batch(config) if auto_batch else None
        try:
            start = launch_on_ray if config.use_ray else launch if config.num_processes > 1 else fit
            return prepared, start(prepared, folder, on_event=on_event, resume=resume)
        except OutOfMemory:
            if smaller is None:
                raise
        # Outside of the except block: the error's traceback holds the model until here.
        _free_memory()
        on_event(Stage(f"out of memory; going on with micro_batch_size {smaller.micro_batch_size}"))
        prepared, resume = replace(prepared, config=smaller), last_checkpoint(folder) is not None
        (folder / RESOLVED).write_text(_resolved(prepared).to_yaml(), encoding="utf-8")


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write_beginning(folder: Path, reading: Reading, prepared: Prepared) -> None:
    (folder / GIVEN).write_text(reading.given, encoding="utf-8")
    (folder / RESOLVED).write_text(_resolved(prepared).to_yaml(), encoding="utf-8")
    (folder / KEYS).write_text(json.dumps([asdict(f) for f in reading.fates], indent=1) + "\n", encoding="utf-8")
    data = {
        "files": _files(prepared),
        "train": _counts(prepared.train),
        "evaluation": _counts(prepared.evaluation) if prepared.evaluation else None,
        "advice": prepared.advice,
    }
    (folder / DATA).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _resolved(prepared: Prepared) -> TrainConfig:
    """The config with the files that were found, wherever it is read from."""
    config, base = prepared.config, prepared.base
    train, test = prepared.train.files, prepared.evaluation.files if prepared.evaluation else ()

    def found(sources: Any, files: Any) -> Any:
        at = [str(f.path.absolute()) if f.path.exists() else s.path for s, f in zip(sources, files, strict=True)]
        return tuple(replace(s, path=path) for s, path in zip(sources, at, strict=True))

    return replace(
        config,
        base_model=str(base.path) if Path(config.base_model).expanduser().is_dir() else config.base_model,
        datasets=found(config.datasets, train),
        test_datasets=found(config.test_datasets, test) if config.test_datasets else (),
        chat_template_jinja=prepared.template if config.chat_template == "jinja" else None,
    )


def _record(prepared: Prepared, fitted: Fitted) -> RunRecord:
    config, base = prepared.config, prepared.base
    metrics = {"train_loss": round(fitted.train_loss, 6)}
    metrics |= {name: round(value, 6) for name, value in fitted.evaluation.items()}
    parent = prepared.start.parent if prepared.start else None
    lineage = Lineage(
        method=config.rl or "sft",
        parents=(parent,) if parent else (),
        config_sha256=_sha256(portable(prepared).to_yaml().encode()),
        data_sha256=data_hashes(prepared),
        seed=config.seed,
        metrics=metrics,
        environment=environment(),
    )
    tokenizer = base.path / "tokenizer.json"
    labels = dict(config.labels) | ({"description": config.description} if config.description else {})
    return RunRecord(
        base=base.fingerprint,
        lineage=lineage,
        name=config.name,
        channel=config.channel,
        labels=labels,
        chat_template_sha256=_sha256(prepared.template.encode()) if prepared.template is not None else "",
        tokenizer_sha256=_sha256(tokenizer.read_bytes()) if tokenizer.is_file() else "",
    )


def environment() -> Mapping[str, str]:
    """Versions that decide about the bytes of an adapter."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _files(prepared: Prepared) -> list[dict[str, Any]]:
    files = list(prepared.train.files)
    files += [f for f in (prepared.evaluation.files if prepared.evaluation else ()) if f not in files]
    return [
        {
            "path": str(f.path),
            "sha256": f.sha256,
            "format": f.format,
            "detected": f.detected,
            "rows": len(f.rows),
            "unused_columns": f.unused,
            "duplicates": f.duplicates,
            "skipped": f.skipped,
        }
        for f in files
    ]


def _counts(split: Split) -> dict[str, Any]:
    return {
        "rows": split.rows,
        "tokens": split.tokens,
        "trained_tokens": split.trained_tokens,
        "dropped": list(split.dropped),
        "truncated": split.truncated,
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
