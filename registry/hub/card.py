"""The model card that people on the Hub see of a version. No I/O."""

from __future__ import annotations

import re
from typing import Any

from adapterhub.manifest import Record

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FRONT = re.compile(r"\A---\r?\n(.*?)^---\r?$\n?", re.DOTALL | re.MULTILINE)
_KEPT = ("license", "license_name", "license_link", "language")  # of the version's own README


def card(record: Record, *, base: str, readme: str = "") -> str:
    """YAML head, the version in numbers, and the text of the version's own README below.

    ``base``: what the adapter's config names. It goes into the head only where it can be a model of the Hub: the Hub
    refuses cards that name a folder of somebody's machine.
    """
    import yaml

    head: dict[str, Any] = {"library_name": "peft", "tags": _tags(record, base)}
    if _HUB_ID.fullmatch(base):
        head["base_model"] = base
    front = _FRONT.match(readme)
    head |= _own(front[1]) if front else {}
    text = readme[front.end() :] if front else readme
    return f"---\n{yaml.safe_dump(head, sort_keys=True)}---\n\n{_body(record, base)}\n{text}"


def _tags(record: Record, base: str) -> list[str]:
    tags = ["adapterhub", "lora", "peft"]
    if _HUB_ID.fullmatch(base):
        tags.append(f"base_model:adapter:{base}")
    return tags + ([record.manifest.lineage.method] if record.manifest.lineage.method else [])


def _own(front: str) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(front)
    except yaml.YAMLError:
        return {}
    own = {key: found[key] for key in _KEPT if key in found} if isinstance(found, dict) else {}
    return {key: value for key, value in own.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _body(record: Record, base: str) -> str:
    shape, lineage = record.manifest.lora, record.manifest.lineage
    rows = {
        "version": str(record.version),
        "digest": f"`{record.digest}`",
        "base": base or "unknown",
        "rank, alpha": f"{shape.rank}, {shape.alpha:g}",
        "modules": ", ".join(shape.target_modules),
        "parameters": f"{shape.parameters:,}",
        **{metric: f"{value:.6g}" for metric, value in sorted(lineage.metrics.items())},
        "published": f"{record.created} by {record.author}",
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    return f"# {record.name}\n\n| | |\n|---|---|\n{table}\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
