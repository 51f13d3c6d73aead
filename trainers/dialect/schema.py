"""The dialect in JSON Schema, for editors: completion, types and red lines while a config is written.

    # yaml-language-server: $schema=adapterhub.schema.json      the config's first line

Made from the tables that read a config, so it knows every key that `ah train` knows. It says less than the reader where
a key depends on another; those are told by `ah train --check`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from adapterhub.trainers.config import DataSource, TrainConfig, UserFormat, UserPreference
from adapterhub.trainers.dialect import keys, meanings
from adapterhub.trainers.dialect.noted import NO_EFFECT, NO_EFFECT_PREFIXES
from adapterhub.trainers.dialect.values import Reader

Schema = dict[str, Any]
_OFF: Schema = {"enum": [None, False, "", 0, [], {}]}


def schema() -> Schema:
    """The whole dialect as a JSON Schema, draft 2020-12."""
    entries = {"type": "array", "minItems": 1, "items": _source()}
    properties = {
        **_table(keys.KEYS, meanings.KEYS, TrainConfig),
        "datasets": _described(_or_null(entries), meanings.KEYS["datasets"]),
        "test_datasets": _described(_or_null(entries), meanings.KEYS["test_datasets"]),
        "adapterhub": _described(
            _or_null(_object(_table(keys.BLOCK_KEYS, meanings.BLOCK, TrainConfig))), meanings.KEYS["adapterhub"]
        ),
        **{key: {"description": f"Without effect here: {why}."} for key, why in NO_EFFECT.items()},
        **{key: _described(_OFF, f"Not supported: {why}.") for key, why in keys.UNSUPPORTED.items()},
        **{key: _described(_OFF, f"Cannot be served: {why}.") for key, why in keys.UNSERVABLE.items()},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "AdapterHub training",
        "description": "Axolotl's keys, read strictly; see `ah train CONFIG.yml --check`.",
        **_object(properties),
        "patternProperties": {
            f"^{start}": {"description": f"Without effect here: {why}."}
            for start, why in NO_EFFECT_PREFIXES.items()
            if not any(key.startswith(start) for key in keys.KEYS)
        }
        | {f"^{start}(?!({'|'.join(own)})$)": {} for start, own in _shared_prefixes().items()},
        "required": ["base_model", "datasets"],
    }


def _shared_prefixes() -> Mapping[str, list[str]]:
    """Prefixes that also begin keys which do something: ``wandb_`` and the rest of ``wandb_project``."""
    found = {}
    for start in NO_EFFECT_PREFIXES:
        own = [key.removeprefix(start) for key in keys.KEYS if key.startswith(start)]
        if own:
            found[start] = own
    return found


def _source() -> Schema:
    formats = [
        _object(_table(keys.USER_FORMAT_KEYS, meanings.USER_FORMAT, UserFormat)),
        _object(_table(keys.USER_PREFERENCE_KEYS, meanings.USER_FORMAT, UserPreference)),
    ]
    properties = _table(keys.SOURCE_KEYS, meanings.SOURCE, DataSource)
    kinds = {"anyOf": [keys.SOURCE_KEYS["type"].schema, *formats]}
    properties["type"] = _described(_or_null(kinds), meanings.SOURCE["type"])
    refused = {key: _described(_OFF, f"Not supported: {why}.") for key, why in keys.SOURCE_UNSUPPORTED.items()}
    return {**_object(refused | properties), "required": ["path"]}


def _table(table: Mapping[str, Reader], meaning: Mapping[str, str], config: type) -> dict[str, Schema]:
    usual = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    found = {}
    for key, reader in table.items():
        found[key] = _described(_or_null(reader.schema), meaning[key])
        default = usual.get(key)
        if isinstance(default, str | int | float) and default != "" and _takes(reader, default):
            found[key]["default"] = default
    return found


def _takes(reader: Reader, value: Any) -> bool:
    try:
        reader(value)
    except ValueError:
        return False
    return True


def _described(schema: Mapping[str, Any], text: str) -> Schema:
    return {"description": text, **schema}


def _object(properties: Mapping[str, Schema]) -> Schema:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _or_null(schema: Mapping[str, Any]) -> Schema:
    """Null unsets every key."""
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    return {**schema, "type": [schema["type"], "null"]}
