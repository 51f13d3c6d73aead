"""Going on from an adapter: a run, an adapter folder, or a version that somebody else finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from adapterhub import peftdir
from adapterhub.base import BaseModel
from adapterhub.errors import AdapterError, ConfigError, InvalidName, NotFound
from adapterhub.manifest import BaseFingerprint
from adapterhub.refs import AdapterRef
from adapterhub.runrecord import ADAPTER, FILE, RunRecord
from adapterhub.trainers.config import TrainConfig


@dataclass(frozen=True)
class Start:
    """The adapter that a training goes on from."""

    name: str  # a version by its digest, acme/support@sha256:…, or the folder
    path: Path
    base: BaseFingerprint | None = None  # that it was trained on, where that is known

    @property
    def parent(self) -> str | None:
        """The digest of the version; None where it is no version."""
        return parent_of(self.name)


FindVersion = Callable[[str], Start]  # a version's name → its files; raises NotFound, InvalidName


def find_start(name: str, *, beside: Path | None, find_version: FindVersion | None) -> Start:
    """The adapter by the name that ``lora_model_dir`` has.

    Args:
        beside: the config file's folder, where a relative path is looked up first.
        find_version: who knows versions; None: nobody.

    Raises:
        NotFound: it is neither a folder nor a version.
        AdapterError: the folder holds no adapter, or a broken run.
    """
    near = [Path(name).expanduser()] if beside is None else [beside / name, Path(name).expanduser()]
    folder = next((path for path in near if path.is_dir()), None)
    if folder is None:
        why = "there is no such folder"
        if find_version is not None and not name.startswith((".", "/", "~")):
            try:
                return find_version(name)
            except (NotFound, InvalidName) as error:
                why += f", and {error.what}"
        raise NotFound(
            f"lora_model_dir: {name} is neither a folder nor a version",
            why=why,
            hint="name a run, an adapter folder, or a version like acme/support@3",
        )
    if (folder / FILE).is_file():
        return Start(str(folder.absolute()), folder / ADAPTER, RunRecord.read(folder / FILE).base)
    return Start(str(folder.absolute()), folder)


def continued(config: TrainConfig, start: Start, base: BaseModel) -> TrainConfig:
    """The config with the shape that the adapter has.

    Raises:
        BaseMismatch: it was trained on another base.
        AdapterError: it is broken, or does not fit the base's layers.
        ConfigError: it is no plain LoRA, so that what is made of it could not be served.
    """
    adapter = peftdir.read(start.path)
    if start.base is not None:
        base.check(start.base, what=start.name)
    base.check_factors(adapter)
    verdict = peftdir.verdicts(adapter).serve
    if verdict.answer == "no" and not config.allow_unservable:
        raise ConfigError(
            f"lora_model_dir: {start.name} cannot be served, nor what is made of it",
            why=verdict.reason,
            hint="go on from another, or train for `ah export` alone: adapterhub: {allow_unservable: true}",
        )
    found = adapter.config
    targets, layers = found.get("target_modules"), found.get("layers_to_transform")
    if adapter.others:
        raise AdapterError(
            f"lora_model_dir: {start.name} holds more than LoRA factors", why=f"such as {adapter.others[0].name}"
        )
    return replace(
        config,
        lora_model_dir=start.name,
        lora_r=int(found.get("r", adapter.shape.rank)),
        lora_alpha=adapter.shape.alpha,
        lora_target_modules=targets if isinstance(targets, str) else tuple(sorted(targets or ())),
        peft_use_rslora=adapter.shape.rslora,
        peft_use_dora=adapter.shape.variant == "dora",
        peft_init_lora_weights=True,
        lora_rank_pattern=dict(found.get("rank_pattern") or {}),
        lora_alpha_pattern=dict(found.get("alpha_pattern") or {}),
        peft_layers_to_transform=None if layers is None else (layers,) if isinstance(layers, int) else tuple(layers),
    )


def parent_of(name: str | None) -> str | None:
    """``acme/support@sha256:…`` → ``sha256:…``; None for a folder."""
    try:
        return AdapterRef.parse(name).digest if name else None
    except InvalidName:
        return None
