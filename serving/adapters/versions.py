"""A version's files on this machine, judged fit for this engine. Blocking: called from worker threads.

`unfit` is the rule, told from the record alone; `Versions.fetch` brings the files and looks at them once more.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from pathlib import Path

from adapterhub import peftdir
from adapterhub.base import BaseModel
from adapterhub.errors import AdapterError, AdapterHubError, BaseMismatch, NotFound, StorageError, Unsupported
from adapterhub.manifest import BaseFingerprint, Record
from adapterhub.registry.cache import Cache
from adapterhub.serving.arguments import RANKS
from adapterhub.serving.tenancy import Manner

log = logging.getLogger(__name__)

TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"


def unfit(record: Record, *, base: BaseFingerprint, max_lora_rank: int) -> AdapterHubError | None:
    """Why this engine cannot serve a version; None where it can."""
    manifest, name = record.manifest, record.ref
    if record.verdicts.serve.answer == "no":
        return Unsupported(f"{name} cannot be served", why=record.verdicts.serve.reason)
    if manifest.base is not None and manifest.base.match(base) == "mismatch":
        return BaseMismatch(
            f"{name} was trained on another base", why=f"it was trained on {manifest.base.name}, this is {base.name}"
        )
    if manifest.lora.rank > max_lora_rank:
        needed = next((rank for rank in RANKS if rank >= manifest.lora.rank), RANKS[-1])
        return Unsupported(
            f"{name} has rank {manifest.lora.rank}",
            why=f"this server was started with --max-lora-rank {max_lora_rank}; it takes --max-lora-rank {needed}",
            hint=f"ah serve … --max-lora-rank {needed}",
        )
    return None


class Versions:
    """Versions as this replica can serve them."""

    def __init__(self, cache: Cache, *, base: BaseModel, max_lora_rank: int) -> None:
        self._cache = cache
        self._base = base
        self._max_lora_rank = max_lora_rank
        self._base_template = read_base_template(base.path)
        self._manners: dict[str, Manner] = {}  # by digest: a folder may be deleted while its adapter serves

    def unfit(self, record: Record) -> AdapterHubError | None:
        return unfit(record, base=self._base.fingerprint, max_lora_rank=self._max_lora_rank)

    def measure(self) -> int:
        """Of all local copies, in bytes."""
        return self._cache.size

    def is_here(self, record: Record) -> bool:
        """Whether its files need not come from the registry."""
        return self._cache.is_present(record)

    def trim(self, limit: int, keep: Collection[str]) -> None:
        """Keep the local copies below ``limit`` bytes, those of ``keep`` (digests) in any case."""
        for folder in self._cache.trim(limit, keep=keep):
            log.info("removed the copy %s, which was not used for longest", folder.name)

    def fetch(self, record: Record) -> Path:
        """The version's verified folder, absolute; downloads what is not there.

        Raises Unsupported, BaseMismatch, Untrusted, NotFound, StorageError, IntegrityError.
        """
        if refusal := self.unfit(record):
            raise refusal
        try:
            path = self._cache.fetch(record).absolute()
            self._base.check_factors(peftdir.read(path))
        except BaseMismatch as error:
            raise BaseMismatch(f"{record.ref} does not fit this base", why=error.why) from error
        except (NotFound, AdapterError) as error:  # lost by the registry, or deleted here a moment ago
            raise StorageError(f"the files of {record.ref} cannot be read", why=str(error)) from error
        self._manners[record.digest] = Manner(self._own_template(record, path), _own_ends(record, path))
        return path

    def manner(self, record: Record) -> Manner:
        """Of a version that was fetched before, without touching its files."""
        return self._manners[record.digest]

    def _own_template(self, record: Record, path: Path) -> str | None:
        if not any(f.path == TEMPLATE for f in record.manifest.files):
            return None
        try:
            template = (path / TEMPLATE).read_text(encoding="utf-8")
        except OSError as error:
            raise StorageError(f"the chat template of {record.ref} cannot be read", why=str(error)) from error
        return None if template == self._base_template else template


def _own_ends(record: Record, path: Path) -> tuple[int, ...]:
    """A base may have been taught an end of turn at which it does not stop by itself."""
    if not any(f.path == GENERATION for f in record.manifest.files):
        return ()
    try:
        found = json.loads((path / GENERATION).read_bytes()).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise StorageError(f"{GENERATION} of {record.ref} cannot be read", why=str(error)) from error
    ids = found if isinstance(found, list) else [found]
    return tuple(i for i in ids if type(i) is int and i >= 0)


def read_base_template(path: Path) -> str:
    """The chat template of a model folder; empty where it has none."""
    if (path / TEMPLATE).is_file():
        return (path / TEMPLATE).read_text(encoding="utf-8")
    settings = path / "tokenizer_config.json"
    template = json.loads(settings.read_bytes()).get("chat_template") if settings.is_file() else None
    return template if isinstance(template, str) else ""
