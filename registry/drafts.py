"""From an adapter directory to a `Draft`: everything that is refused is refused here, before a byte is stored.

    RUN/run.json + RUN/adapter/     a run of `ah train`: name, base, lineage come along
    DIR                             any directory that PEFT wrote

Of the directory these are published, and nothing else: never a pickle, never a checkpoint.

    adapter_config.json             without secrets and absolute paths
    adapter_model.safetensors       read once: hashed, and judged beside it
    chat_template.jinja, generation_config.json, training.yml, the tokenizer's files, README.md
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adapterhub import peftdir, runrecord
from adapterhub.errors import AdapterError, Unsupported
from adapterhub.manifest import BaseFingerprint, FileEntry, Lineage, Manifest, Verdict, Verdicts
from adapterhub.peftdir import CONFIG, WEIGHTS, PeftDir
from adapterhub.registry.base import Draft
from adapterhub.registry.clean import clean
from adapterhub.registry.weights import Scan, scan
from adapterhub.runrecord import RunRecord

if TYPE_CHECKING:
    from adapterhub.base import BaseModel  # imports numpy; only its caller needs it

Purpose = Literal["serve", "export"]

TEMPLATE = "chat_template.jinja"
TOKENIZER = "tokenizer.json"
BESIDE = (  # published where they are
    TEMPLATE,
    TOKENIZER,
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "generation_config.json",
    runrecord.TRAINING,
    "README.md",
)


def draft(
    path: Path,
    *,
    base: BaseModel | None = None,
    allow_zero: bool = False,
    purpose: Purpose = "serve",
) -> Draft:
    """Read, hash and judge an adapter directory or a run folder.

    Without ``base`` nobody can say whether the tensors fit, and the verdicts are `unknown`. ``allow_zero`` lets an
    adapter pass that changes nothing. ``purpose`` is what it must be good for.

    Raises:
        AdapterError: broken, not finite, all zero, a link.
        Unsupported: whole, but the engine cannot serve it, or with ``purpose`` ``export`` nobody can merge it.
        BaseMismatch: trained on another base than ``base``.
    """
    folder, run = find_run(path)
    adapter = peftdir.read(folder)
    present = [name for name in (CONFIG, WEIGHTS, *BESIDE) if (folder / name).exists() or (folder / name).is_symlink()]
    _refuse_links(folder, present)
    notes = _check_base(adapter, base, run)
    verdicts = _verdicts(adapter, base)
    _refuse_useless(adapter, verdicts, purpose)
    scanned = scan(folder / WEIGHTS, list(adapter.tensors.values()))
    _refuse_numbers(adapter, scanned, allow_zero=allow_zero)
    config = clean(adapter.config)
    files = {
        CONFIG: FileEntry(CONFIG, len(config), hashlib.sha256(config).hexdigest()),
        WEIGHTS: FileEntry(WEIGHTS, scanned.size, scanned.sha256),
    } | {name: _entry(folder, name) for name in present if name in BESIDE}
    manifest = Manifest(
        files=tuple(files.values()),
        lora=adapter.shape,
        base=_fingerprint(base, run),
        chat_template_sha256=(run and run.chat_template_sha256) or _sha256_of(files, TEMPLATE),
        tokenizer_sha256=(run and run.tokenizer_sha256) or _sha256_of(files, TOKENIZER),
        lineage=run.lineage if run else Lineage(),
    )
    return Draft(folder, manifest, verdicts, replaced={CONFIG: config}, run=run, notes=notes)


def find_run(path: Path) -> tuple[Path, RunRecord | None]:
    """The adapter directory that ``path`` means, and the record of the run it belongs to.

    ``path`` may be the run's folder, the adapter folder inside it, or a directory that no run made.
    """
    if (path / runrecord.FILE).is_file():
        return path / runrecord.ADAPTER, RunRecord.read(path / runrecord.FILE)
    beside = path.absolute().parent / runrecord.FILE
    if path.absolute().name == runrecord.ADAPTER and beside.is_file():
        return path, RunRecord.read(beside)
    return path, None


def _refuse_links(folder: Path, names: list[str]) -> None:
    for name in names:
        if (folder / name).is_symlink():
            raise AdapterError(
                f"{folder / name} is a symbolic link",
                why="a link could publish a file from anywhere on this machine",
                hint=f"copy the folder with its files (cp -rL {folder} COPY) and publish the copy",
            )


def _check_base(adapter: PeftDir, base: BaseModel | None, run: RunRecord | None) -> tuple[str, ...]:
    if base is None:
        return ()
    note = base.check(run.base, what=str(adapter.path)) if run else ""
    base.check_factors(adapter)
    return (note,) if note else ()


def _verdicts(adapter: PeftDir, base: BaseModel | None) -> Verdicts:
    judged = peftdir.verdicts(adapter)
    if base is not None:
        return judged
    unknown = "the base was not at hand, so nobody checked that the tensors fit it"

    def unsure(verdict: Verdict) -> Verdict:
        return verdict if verdict.answer == "no" else replace(verdict, answer="unknown", reason=unknown)

    return Verdicts(serve=unsure(judged.serve), merge=unsure(judged.merge), gguf=unsure(judged.gguf))


def _refuse_useless(adapter: PeftDir, verdicts: Verdicts, purpose: Purpose) -> None:
    if purpose == "serve" and verdicts.serve.answer == "no":
        mergeable = verdicts.merge.answer != "no"
        raise Unsupported(
            f"{adapter.path} cannot be served by {verdicts.serve.engine}",
            why=verdicts.serve.reason,
            hint="publish it for export alone: ah publish … --for export" if mergeable else "train it without that",
        )
    if purpose == "export" and verdicts.merge.answer == "no":
        raise Unsupported(f"{adapter.path} cannot be exported", why=verdicts.merge.reason, hint="train it without that")


def _refuse_numbers(adapter: PeftDir, found: Scan, *, allow_zero: bool) -> None:
    if found.not_finite is not None:
        raise AdapterError(
            f"{adapter.path / WEIGHTS} holds NaN or infinite numbers",
            why=f"first in {found.not_finite}",
            hint="train again with a lower learning rate; the run's loss curve shows where it broke",
        )
    if not allow_zero and all(factor.b.name in found.zero for factor in adapter.factors):
        raise AdapterError(
            f"{adapter.path} changes nothing",
            why="every B is zero, as in an adapter that was never trained",
            hint="train it, or publish it on purpose with --allow-zero",
        )


def _fingerprint(base: BaseModel | None, run: RunRecord | None) -> BaseFingerprint | None:
    """What the run recorded: the base at hand may be a copy in another dtype."""
    if run is not None:
        return run.base
    return base.fingerprint if base is not None else None


def _entry(folder: Path, name: str) -> FileEntry:
    try:
        with (folder / name).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return FileEntry(name, file.tell(), sha256)
    except OSError as error:
        raise AdapterError(f"{folder / name} cannot be read", why=error.strerror or str(error)) from error


def _sha256_of(files: dict[str, FileEntry], name: str) -> str:
    return files[name].sha256 if name in files else ""
