"""What a training says of itself, apart from where it ran: the portable config, and how a rerun is told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterhub.errors import DataError
from adapterhub.peftdir import WEIGHTS
from adapterhub.trainers.config import DataSource, TrainConfig
from adapterhub.trainers.data import DataFile
from adapterhub.trainers.prepare import Prepared


def portable(prepared: Prepared) -> TrainConfig:
    """The config without a path of this machine: the same training elsewhere has the same."""
    config = prepared.config
    return replace(
        config,
        base_model=prepared.base.name,
        output_dir=None,
        lora_model_dir=_start(prepared),
        datasets=_named(config.datasets, prepared.train.files),
        test_datasets=_named(config.test_datasets, prepared.evaluation.files if prepared.evaluation else ()),
        **_texts(prepared),
        report_to=(),  # whom it was told to changes no weight, and is nobody's business
        wandb_project=None,
        wandb_entity=None,
        wandb_name=None,
        mlflow_tracking_uri=None,
        mlflow_experiment_name=None,
    )


def at_hand(config: TrainConfig, *, base: str, data: Sequence[Path], output_dir: Path) -> TrainConfig:
    """A portable config with the base and the data files of this machine, found by their names.

    Args:
        data: files, or folders that hold them. What is on S3 or the Hub needs none: it is fetched again.

    Raises DataError where one is missing.
    """
    files = {file.name: file for path in data for file in (sorted(path.iterdir()) if path.is_dir() else [path])}

    def found(source: DataSource) -> DataSource:
        name = source.path.rsplit("/", 1)[-1]
        if name in files:
            return replace(source, path=str(files[name].absolute()))
        if "/" in source.path:  # an address, see `_named`
            return source
        raise DataError(
            f"the data file {name} is not among those given",
            why="the training was made with it; it is found by its name and known by its hash",
            hint=f"--data PATH/{name}, or a folder that holds it",
        )

    return replace(
        config,
        base_model=base,
        datasets=tuple(map(found, config.datasets)),
        test_datasets=tuple(map(found, config.test_datasets)),
        output_dir=str(output_dir),
    )


def data_hashes(prepared: Prepared) -> tuple[str, ...]:
    """sha256 of every data file, those of the training first, each once."""
    files = [*prepared.train.files, *(prepared.evaluation.files if prepared.evaluation else ())]
    return tuple(dict.fromkeys(file.sha256 for file in files))


def changes(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is not as it was, in words: ``torch 2.12.0 → 2.13.0``."""
    names = sorted({*then, *now})
    return [f"{n} {then.get(n, 'absent')} → {now.get(n, 'absent')}" for n in names if then.get(n) != now.get(n)]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _texts(prepared: Prepared) -> dict[str, Any]:
    """The template's text in the place of its file, and what a tokenizer from elsewhere changed in the place of it."""
    config, tokenizer = prepared.config, prepared.tokenizer
    template = {"chat_template": "jinja", "chat_template_jinja": prepared.template}
    if not config.tokenizer_config:
        return template if config.chat_template == "jinja" else {}
    tokens = {key: getattr(tokenizer, key) for key in ("pad_token", "eos_token", "bos_token")}
    kept = {"tokenizer_config": None, "special_tokens": {key: token for key, token in tokens.items() if token}}
    return kept | (template if prepared.template is not None else {})


def _start(prepared: Prepared) -> str | None:
    """The version that it went on from, or the hash of weights that are no version."""
    start = prepared.start
    if start is None or start.parent is not None:
        return start.name if start else None
    return "sha256:" + file_sha256(start.path / WEIGHTS)


def _named(sources: tuple[DataSource, ...], files: Sequence[DataFile]) -> tuple[DataSource, ...]:
    """Local files by their names; what is on S3 or the Hub by its whole address, where it is found again."""
    return tuple(
        replace(source, path=Path(source.path).name)
        if file.path.exists() and not source.path.startswith("s3://")
        else source
        for source, file in zip(sources, files, strict=bool(sources))
    )
