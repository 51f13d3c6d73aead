"""``RUN/run.json``: what a finished training says of its adapter, for the registry to put into the manifest.

    RUN/
    ├── run.json       this record
    └── adapter/       what PEFT's save_pretrained wrote, the tokenizer and chat template beside it

Written by the trainers, read by `registry.drafts`: neither knows the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub.errors import AdapterError, StorageError, Unsupported
from adapterhub.manifest import FORMAT, BaseFingerprint, Lineage, from_plain, to_plain
from adapterhub.refs import AdapterName

FILE = "run.json"
ADAPTER = "adapter"  # the folder beside it
TRAINING = "training.yml"  # in that folder: the resolved config, without a path of the machine that trained


@dataclass(frozen=True)
class RunRecord:
    """One training: what it was trained on, and what it shall be published as."""

    base: BaseFingerprint
    lineage: Lineage = field(default_factory=Lineage)
    name: AdapterName | None = None  # the config's, default of `ah publish --name`
    channel: str | None = None  # likewise, of --channel
    labels: Mapping[str, str] = field(default_factory=dict)
    chat_template_sha256: str = ""  # of the template trained with; empty for text without one
    tokenizer_sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": str(self.name) if self.name else None,
            "channel": self.channel,
            "labels": dict(self.labels),
            "base": to_plain(self.base),
            "chat_template_sha256": self.chat_template_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "lineage": to_plain(self.lineage),
        }

    def write(self, path: Path) -> None:
        """Write ``path`` (the ``run.json``) whole or not at all. Raises StorageError."""
        unfinished = path.with_name(path.name + ".tmp")
        try:
            unfinished.write_text(json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            unfinished.replace(path)
        except OSError as error:
            raise StorageError(f"{path} cannot be written", why=error.strerror or str(error)) from error

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read ``path`` (the ``run.json``).

        Raises:
            AdapterError: it is not there, or not a run's record.
            Unsupported: a newer AdapterHub wrote it.
            InvalidName: its adapter name is outside the grammar.
        """
        try:
            data = json.loads(path.read_bytes())
            if data["format"] > FORMAT:
                raise Unsupported(
                    f"{path} has format {data['format']}, this AdapterHub reads up to {FORMAT}",
                    why="it was written by a newer AdapterHub",
                    hint="pip install --upgrade adapterhub",
                )
            return cls(
                base=from_plain(BaseFingerprint, data["base"]),
                lineage=from_plain(Lineage, data.get("lineage") or {}),
                name=AdapterName.parse(data["name"]) if data.get("name") else None,
                channel=data.get("channel"),
                labels=dict(data.get("labels") or {}),
                chat_template_sha256=data.get("chat_template_sha256", ""),
                tokenizer_sha256=data.get("tokenizer_sha256", ""),
            )
        except OSError as error:
            raise AdapterError(f"{path} cannot be read", why=error.strerror or str(error)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(
                f"{path} is not the record of a run", why=repr(error), hint="name the adapter folder itself"
            ) from error
