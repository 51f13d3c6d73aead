"""Reads a config strictly: every key accounted for, every default filled in.

file + flags ──read_config──► TrainConfig   frozen; its fields are Axolotl's keys
                              KeyFates      honoured, approximated or without effect, key by key
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import yaml

from adapterhub.errors import ConfigError, InvalidName
from adapterhub.refs import AdapterName, check_channel
from adapterhub.trainers.config import (
    MESSAGE_PROPERTIES,
    RANKS,
    DataSource,
    TrainConfig,
    UserFormat,
    UserPreference,
)
from adapterhub.trainers.dialect import keys
from adapterhub.trainers.dialect.fate import KeyFate, Machine, shown
from adapterhub.trainers.dialect.noted import ALSO_CALLED, NO_EFFECT, NO_EFFECT_PREFIXES
from adapterhub.trainers.dialect.rules import (
    NOT_ADAPTED,
    RULES,
    attention,
    contradictions,
    keeps_best,
    source_fate,
    templates_of,
)
from adapterhub.trainers.dialect.values import TRACKERS, Reader
from adapterhub.trainers.dialect.yamlfile import YamlFile


@dataclass(frozen=True)
class Reading:
    """A config that passed, and what became of its keys."""

    config: TrainConfig
    fates: tuple[KeyFate, ...]
    given: str  # the YAML text as given, flags included


def read_config(
    file: YamlFile,
    *,
    flags: Mapping[str, tuple[str, Any]] | None = None,
    machine: Machine | None = None,
    allow_unknown_keys: bool = False,
) -> Reading:
    """Read a config strictly.

    Args:
        flags: values from the command line by key, each with the flag's name; keys of the ``adapterhub`` block are
            written ``adapterhub.name``. They win over the file.
        machine: what there is to train on; looked up where None.
        allow_unknown_keys: an unknown key is noted as without effect instead of refused.

    Raises:
        ConfigError: an unknown key (with a suggestion), a wrong value, a missing or contradictory key, a key of a
            later version, or a combination that could not be served.
        InvalidName: the adapter's name or channel is outside the grammar.
    """
    reader = _Reader(_with_flags(file, flags or {}), flags or {}, machine or Machine.here(), allow_unknown_keys)
    config = reader.config()
    return Reading(config, tuple(reader.fates), _given(reader.file, flags or {}, file))


class _Reader:
    """One pass over the keys; collects values and fates."""

    def __init__(
        self, file: YamlFile, flags: Mapping[str, tuple[str, Any]], machine: Machine, allow_unknown_keys: bool
    ) -> None:
        self.file, self.flags, self.machine, self.allow_unknown = file, flags, machine, allow_unknown_keys
        self.fates: list[KeyFate] = []

    def config(self) -> TrainConfig:
        values = {key: value for key, value in self.file.values.items() if value is not None}
        block = self._block(values.pop("adapterhub", None))
        read = self._table(values, keys.KEYS, (), skip=("datasets", "test_datasets"))
        sources = {k: self._sources(k, values.get(k)) for k in ("datasets", "test_datasets")}
        for key in ("base_model", "datasets"):
            if not values.get(key):
                raise ConfigError(
                    f"{self.file.source}: {key} is missing",
                    why="a training needs a base model and data",
                    hint="add `base_model: DIR|HUB_ID`, or --base" if key == "base_model" else "add --data train.jsonl",
                )
        for key in read:
            self.fates.append(self._fate(key, read))
        self._contradictions(read, sources)
        self._servable(read, block)
        names = {f.name for f in fields(TrainConfig)}
        chosen: dict[str, Any] = {k: v for k, v in read.items() if k in names} | sources | block
        return self._derived(TrainConfig(**chosen), read)

    # ── keys ──

    def _table(
        self,
        values: Mapping[Any, Any],
        table: Mapping[str, Reader],
        path: tuple[str | int, ...],
        skip: Any = (),
    ) -> dict[str, Any]:
        """Check every key of a mapping against its table; read the values of those that are on."""
        read = {}
        for key, value in values.items():
            if value is None or key in skip:
                continue
            if key in table:
                try:
                    read[key] = table[key](value)
                except ValueError as error:
                    raise ConfigError(
                        f"{self._where((*path, key))}: {key} {error}", why=f"it is {shown(value)}"
                    ) from error
            else:
                self._other_key((*path, key), value, table)
        return read

    def _other_key(self, path: tuple[str | int, ...], value: Any, table: Mapping[str, Any]) -> None:
        key, top = str(path[-1]), len(path) == 1
        refused = keys.UNSUPPORTED if top else keys.SOURCE_UNSUPPORTED if path[0] != "adapterhub" else {}
        off = value is False or value in ("", [], {}, 0)
        if key in refused or (top and key in keys.UNSERVABLE):
            if off:
                self.fates.append(KeyFate(key, "honoured", "off", self._where(path)))
            elif key in refused:
                raise ConfigError(
                    f"{self._where(path)}: {key} is not supported",
                    why=refused[key],
                    hint=f"take {key} out, or set it to null",
                )
            else:
                raise ConfigError(
                    f"{self._where(path)}: an adapter trained with {key} cannot be served",
                    why=keys.UNSERVABLE[key],
                    hint=f"take {key} out: a plain LoRA adapter serves, merges and exports",
                )
            return
        note = _no_effect(key) if top else None
        if note is None:
            note = self._unknown(path, table)
        self.fates.append(KeyFate(key, "without effect", note, self._where(path)))

    def _unknown(self, path: tuple[str | int, ...], table: Mapping[str, Any]) -> str:
        key = str(path[-1])
        known = keys.known_keys() if len(path) == 1 else (*table, *keys.SOURCE_UNSUPPORTED)
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        if len(path) == 1 and key in ALSO_CALLED:
            close = [ALSO_CALLED[key]]
        if self.allow_unknown:
            return "unknown key" + (f"; did you mean {close[0]}?" if close else "")
        raise ConfigError(
            f"{self._where(path)}: unknown key {key!a}",
            why=f"did you mean {close[0]}?" if close else "it is neither one of Axolotl's keys nor one of ours",
            hint="correct it, take it out, or note it only: --allow-unknown-keys",
        )

    def _block(self, block: Any) -> dict[str, Any]:
        if block is None:
            return {}
        if not isinstance(block, dict):
            raise ConfigError(f"{self._where(('adapterhub',))}: adapterhub expects lines like `name: acme/support`")
        read = self._table(block, keys.BLOCK_KEYS, ("adapterhub",))
        for key, check in (("name", AdapterName.parse), ("channel", check_channel)):
            if key in read:
                try:
                    checked = check(read[key])
                except InvalidName as error:
                    where = self._where(("adapterhub", key))
                    raise InvalidName(f"{where}: {error.what}", why=error.why, hint=error.hint) from error
                read[key] = checked if key == "name" else read[key]
        for key, value in read.items():
            self.fates.append(KeyFate(f"adapterhub.{key}", "honoured", shown(value), self._where(("adapterhub", key))))
        return read

    def _sources(self, key: str, value: Any) -> tuple[DataSource, ...]:
        if value is None:
            return ()
        if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
            raise ConfigError(f"{self._where((key,))}: {key} expects a list like `- path: train.jsonl`")
        return tuple(self._source((key, i), entry) for i, entry in enumerate(value))

    def _source(self, path: tuple[str | int, ...], entry: Mapping[str, Any]) -> DataSource:
        user = entry.get("type")
        plain = {k: v for k, v in entry.items() if k != "type"} if isinstance(user, dict) else entry
        read = self._table(plain, keys.SOURCE_KEYS, path)
        if "path" not in read:
            raise ConfigError(f"{self._where(path)}: path is missing", hint="write `- path: train.jsonl`")
        if isinstance(user, dict):
            preference = self.file.values.get("rl") is not None
            read["type"] = (self._user_preference if preference else self._user_format)(user, (*path, "type"))
        self._check_kind(read.get("type"), path)
        properties = read.get("message_property_mappings", {})
        unknown = sorted(set(properties) - set(MESSAGE_PROPERTIES))
        if unknown:
            raise ConfigError(
                f"{self._where((*path, 'message_property_mappings', unknown[0]))}: unknown property {unknown[0]!a}",
                why=", ".join(MESSAGE_PROPERTIES) + " can be mapped",
            )
        dotted = f"{path[0]}[{path[1]}]"
        for key, value in read.items():
            kind, note = source_fate(key, value, read, rl=self.file.values.get("rl") is not None)
            self.fates.append(KeyFate(f"{dotted}.{key}", kind, note, self._where((*path, key))))
        names = {f.name for f in fields(DataSource)}
        chosen = {k: v for k, v in read.items() if k in names}
        return DataSource(**chosen | {"roles": _inverted(read.get("roles", {}), self._where((*path, "roles")))})

    def _check_kind(self, kind: Any, path: tuple[str | int, ...]) -> None:
        """Preference types go with ``rl``, the others without; ``chat_template`` is both."""
        method = self.file.values.get("rl")
        wrong = keys.PREFERENCE_TYPES if method is None else keys.TYPES
        if kind in wrong and kind != "chat_template":
            raise ConfigError(
                f"{self._where((*path, 'type'))}: type {kind} is for "
                + ("preference training" if method is None else "supervised training"),
                why="rl is not set" if method is None else f"rl is {method}",
                hint="set rl: dpo, ipo, kto, orpo or simpo"
                if method is None
                else "take type out: preference rows are told from their columns",
            )

    def _user_format(self, given: Mapping[str, Any], path: tuple[str | int, ...]) -> UserFormat:
        read = self._table(given, keys.USER_FORMAT_KEYS, path)
        for key in ("format", "no_input_format"):
            if key in read and "{instruction}" not in read[key]:
                raise ConfigError(
                    f"{self._where((*path, key))}: {key} does not write the instruction",
                    why="{instruction} stands for the column of field_instruction, and {input} for that of field_input",
                )
        return UserFormat(**read)

    def _user_preference(self, given: Mapping[str, Any], path: tuple[str | int, ...]) -> UserPreference:
        read = self._table(given, keys.USER_PREFERENCE_KEYS, path)
        if "prompt_format" in read and "{prompt}" not in read["prompt_format"]:
            raise ConfigError(
                f"{self._where((*path, 'prompt_format'))}: prompt_format does not write the prompt",
                why="{prompt} stands for the column of field_prompt, and {system} for that of field_system",
            )
        return UserPreference(**read)

    def _where(self, path: tuple[str | int, ...]) -> str:
        name = ".".join(str(part) for part in path)
        flag = self.flags.get(name) or self.flags.get(str(path[0]))
        return flag[0] if flag else self.file.where(path)

    # ── fates and defaults ──

    def _fate(self, key: str, read: Mapping[str, Any]) -> KeyFate:
        rule = RULES.get(key)
        kind, note = rule(read[key], read, self.machine) if rule else ("honoured", shown(read[key]))
        return KeyFate(key, kind, note, self._where((key,)))

    def _contradictions(self, read: Mapping[str, Any], sources: Mapping[str, Any]) -> None:
        for first, second, wrong, why in contradictions(read, sources):
            if wrong:
                raise ConfigError(f"{self._where((first,))}: {first} contradicts {second}", why=why)
        targets = read.get("lora_target_modules", ())
        outside = [t for t in ([targets] if isinstance(targets, str) else targets) if t in NOT_ADAPTED]
        if outside:
            raise ConfigError(
                f"{self._where(('lora_target_modules',))}: an adapter on {outside[0]} cannot be served",
                why="the serving engine adapts the linear layers of the blocks only",
                hint="use lora_target_linear: true",
            )

    def _servable(self, read: Mapping[str, Any], block: Mapping[str, Any]) -> None:
        if read.get("peft_use_dora") and not block.get("allow_unservable"):
            raise ConfigError(
                f"{self._where(('peft_use_dora',))}: an adapter trained with peft_use_dora cannot be served",
                why="the serving engine has no DoRA magnitude vectors",
                hint="take it out, or train it for `ah export` alone: adapterhub: {allow_unservable: true}",
            )

    def _derived(self, config: TrainConfig, read: Mapping[str, Any]) -> TrainConfig:
        changes: dict[str, Any] = {}
        if config.use_ray and config.num_processes > 1:
            raise ConfigError(
                f"{self._where(('adapterhub', 'num_processes'))}: num_processes contradicts use_ray",
                why="on Ray ray_num_workers says how many take part",
                hint="take one of the two out",
            )
        if "lora_r" not in read and config.task:
            changes["lora_r"] = RANKS[config.task]
        if read.get("lora_target_linear") or "lora_target_modules" not in read:
            changes["lora_target_modules"] = "all-linear"
        changes["eval_batch_size"] = read.get("eval_batch_size", config.micro_batch_size)
        if config.rl:
            changes |= {"train_on_inputs": False, "lora_dropout": 0.0}
        changes["model_revision"] = read.get("model_revision") or read.get("revision_of_model")
        changes["load_in_4bit"] = read.get("adapter") == "qlora"
        changes["gradient_checkpointing"] = bool(config.gradient_checkpointing)
        if "batch_size" in read:
            changes["gradient_accumulation_steps"] = max(1, read["batch_size"] // config.micro_batch_size)
        for template, jinja in templates_of(config.datasets + config.test_datasets):
            changes |= {"chat_template": template, "chat_template_jinja": jinja}
        for key in ("datasets", "test_datasets"):  # it is the whole config's now
            found = getattr(config, key)
            changes[key] = tuple(replace(s, chat_template=None, chat_template_jinja=None) for s in found)
        changes["attn_implementation"] = attention(read, self.machine)
        if not self.machine.gpu:
            changes |= {"bf16": bool(config.bf16) and self.machine.bf16, "fp16": False, "tf32": False}
            changes["optimizer"] = "adamw_torch_fused" if config.optimizer in keys.BITS_ADAM else config.optimizer
        for when in ("eval", "save"):
            if f"{when}_strategy" not in read and (f"{when}_steps" in read or f"{when}s_per_epoch" in read):
                changes[f"{when}_strategy"] = "steps"
        if keeps_best(read):
            strategy = changes.get("eval_strategy", config.eval_strategy)
            strategy = "epoch" if strategy == "no" else strategy
            changes |= {"eval_strategy": strategy, "save_strategy": strategy, "load_best_model_at_end": True}
            changes |= {"save_steps": config.eval_steps, "saves_per_epoch": config.evals_per_epoch}
        on = [name for name in TRACKERS if name in config.report_to or read.get(f"use_{name}")]
        if config.wandb_project and read.get("use_wandb") is not False and "wandb" not in on:
            on.append("wandb")
        changes["report_to"] = tuple(on)
        return replace(config, **changes)


def _no_effect(key: str) -> str | None:
    prefix = next((why for start, why in NO_EFFECT_PREFIXES.items() if key.startswith(start)), None)
    return NO_EFFECT.get(key, prefix)


def _inverted(roles: Mapping[str, Any], where: str) -> dict[str, str]:
    """Axolotl writes ``user: [human, user]``; we look roles up the other way round."""
    found = {}
    for target, names in roles.items():
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str):
                raise ConfigError(f"{where}: roles expects lines like `user: [human]`")
            found[name] = str(target)
    return found


def _with_flags(file: YamlFile, flags: Mapping[str, tuple[str, Any]]) -> YamlFile:
    values = dict(file.values)
    for key, (_, value) in flags.items():
        head, _, inner = key.partition(".")
        if inner:
            values[head] = {**(values.get(head) or {}), inner: value}
        else:
            values[head] = value
    return replace(file, values=values)


def _given(merged: YamlFile, flags: Mapping[str, tuple[str, Any]], file: YamlFile) -> str:
    if not flags:
        return file.text
    header = f"# {file.source if file.text else 'flags'}, with " + " ".join(
        sorted({flag for flag, _ in flags.values()})
    )
    return header + "\n" + yaml.safe_dump(dict(merged.values), sort_keys=False, allow_unicode=True, width=120)
