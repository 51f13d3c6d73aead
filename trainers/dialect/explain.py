"""One key of the dialect, explained."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub.errors import ConfigError
from adapterhub.trainers.dialect.noted import ALSO_CALLED
from adapterhub.trainers.dialect.schema import schema


@dataclass(frozen=True)
class Explanation:
    """What a key means, what it takes, and what it is where it is not given."""

    key: str
    meaning: str
    takes: str
    default: Any = None


def explain(key: str) -> Explanation:
    """A key by its name: ``lora_r``, ``datasets.train_on_eos``, ``adapterhub.task``. Raises ConfigError: unknown."""
    known = _known()
    found = known.get(key) or known.get(f"datasets.{key}") or known.get(f"adapterhub.{key}")
    if found is None:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        close = [ALSO_CALLED[key]] if key in ALSO_CALLED else close
        raise ConfigError(
            f"there is no key {key!a}",
            why=f"did you mean {close[0]}?" if close else "it is neither one of Axolotl's keys nor one of ours",
            hint=f"ah config explain {close[0]}" if close else "ah config schema",
        )
    return Explanation(key, found["description"], takes(found), found.get("default"))


def takes(part: Mapping[str, Any]) -> str:
    """What a JSON Schema allows, in words."""
    if "enum" in part:
        return "one of " + ", ".join(_shown(value) for value in part["enum"] if value is not None)
    if "anyOf" in part:
        return " or ".join(dict.fromkeys(takes(p) for p in part["anyOf"] if p.get("type") != "null"))
    kind = part.get("type", "anything")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "array":
        return f"a list of {takes(part['items'])}"
    words = {
        "object": "lines of keys and values",
        "string": "text",
        "boolean": "true or false",
        "integer": "a whole number",
    }
    low, high = part.get("minimum", part.get("exclusiveMinimum")), part.get("maximum")
    bounds = "" if low is None else f" {'above' if 'exclusiveMinimum' in part else 'from'} {low:g}"
    return words.get(kind, f"a {kind}" if kind == "number" else kind) + bounds + (f" to {high:g}" if high else "")


def _known() -> dict[str, Mapping[str, Any]]:
    properties = schema()["properties"]
    inner = properties["datasets"]["items"]["properties"]
    block = properties["adapterhub"]["properties"]
    return {
        **properties,
        **{f"datasets.{key}": part for key, part in inner.items()},
        **{f"adapterhub.{key}": part for key, part in block.items()},
    }


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
