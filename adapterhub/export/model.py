"""Base + adapter → a standalone model: plan, merge, sidecars, certificate, and only then the final name."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import adapterhub
from adapterhub import peftdir
from adapterhub.base import BaseModel
from adapterhub.errors import AdapterError, UsageError
from adapterhub.export import certificate as proof
from adapterhub.export.answers import Divergence, compare, require_comparison
from adapterhub.export.card import model_card
from adapterhub.export.evidence import Certificate
from adapterhub.export.merge import merge
from adapterhub.export.plan import Plan, plan_export
from adapterhub.export.sidecars import write_sidecars
from adapterhub.export.staging import staged
from adapterhub.manifest import BaseFingerprint, Record, canonical_json, to_plain
from adapterhub.registry.weights import Scan, scan


@dataclass(frozen=True)
class ExportResult:
    """A model that is durable under its final name."""

    path: Path
    merged: int  # tensors
    bytes_written: int  # weights
    merge_seconds: float  # all but the certificate: until the last fsync and the rename
    certificate_seconds: float
    certificate: Certificate | None
    note: str = ""  # of the plan

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "merged": self.merged,
            "bytes_written": self.bytes_written,
            "merge_seconds": round(self.merge_seconds, 3),
            "certificate_seconds": round(self.certificate_seconds, 3),
            "certificate": self.certificate.summary() if self.certificate else None,
            "note": self.note,
        }


def export_model(
    adapter: Path,
    base: BaseModel,
    to: Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    base_precision: str | None = None,
    max_shard_size: int | None = None,
    link: bool = False,
    resume: bool = False,
    recorded: BaseFingerprint | None = None,
    record: Record | None = None,
    made_of: Sequence[str] = (),
    certificate: bool = True,
    kl_divergence: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportResult:
    """Merge the adapter in the folder ``adapter`` into ``base`` and write the model to the new folder ``to``.

    ``dtype``, ``quantize``, ``group_size``, ``base_precision``, ``max_shard_size``: as `plan_export`. ``link``: weight
    files in which nothing changes become hard links to the base's. ``resume`` goes on with what a killed export to
    ``to`` left. ``recorded`` is the fingerprint of the base that the adapter was trained on (left out, that of
    ``record``); a base that is another is refused. ``record`` goes into the model card and the certificate, and so
    do, for people, the adapters that this one was ``made_of``. ``kl_divergence`` compares a quantised model's answers
    with the plain model's, and takes disk and memory for that. ``progress`` is called with bytes done and in all, each
    byte counted twice where it is merged and then checked.

    The model is checked before it gets its name: what is not proven equal is not exported. On any error nothing is
    left; a killed export leaves a hidden folder beside ``to``, which the next export to ``to`` goes on with or deletes.

    Raises:
        AdapterError, Unsupported, BaseMismatch, AlreadyExists, StorageError, UsageError: as `plan_export`.
        Conflict: another export to ``to`` is under way, or what is to be resumed is another export.
        IntegrityError: the result failed its check.
    """
    started = time.perf_counter()
    recorded = recorded or (record.manifest.base if record else None)
    plan = plan_export(
        adapter,
        base,
        to.expanduser().absolute(),
        dtype=dtype,
        quantize=quantize,
        group_size=group_size,
        base_precision=base_precision,
        max_shard_size=max_shard_size,
        recorded=recorded,
    )
    if kl_divergence:
        _check_comparison(plan, certificate=certificate)
    scanned = _scan(plan)
    checked, checking = None, 0.0

    def tell(done: int) -> None:
        if progress:
            progress(done, plan.bytes_written * (2 if certificate else 1))

    with staged(plan.to, key=_key(plan, scanned), resume=resume) as staging:
        merge(plan, staging, link=link, progress=tell)
        write_sidecars(plan, staging.folder)
        card = model_card(plan, record, weights_sha256=scanned.sha256, made_of=made_of)
        (staging.folder / "README.md").write_text(card, encoding="utf-8")
        if certificate:
            before = time.perf_counter()
            checked = _prove(plan, staging.folder, tell, kl_divergence=kl_divergence)
            _write_certificate(plan, checked, staging.folder, record=record, made_of=made_of, scanned=scanned)
            checking = time.perf_counter() - before
        staging.commit()
    return ExportResult(
        path=plan.to,
        merged=len(plan.merged),
        bytes_written=plan.bytes_written,
        merge_seconds=time.perf_counter() - started - checking,
        certificate_seconds=checking,
        certificate=checked,
        note=plan.note,
    )


def _check_comparison(plan: Plan, *, certificate: bool) -> None:
    if plan.scheme is None:
        why, hint = "it compares a quantised model with the same one without that", "--quantize w8a8 --kl-divergence"
        raise UsageError("--kl-divergence is for --quantize alone", why=why, hint=hint)
    if not certificate:
        raise UsageError("--kl-divergence is part of the certificate", hint="leave --no-certificate out")
    require_comparison()


def _prove(plan: Plan, folder: Path, tell: Callable[[int], None], *, kl_divergence: bool) -> Certificate:
    checked = proof.certify(plan, folder, progress=lambda done: tell(plan.bytes_written + done))
    return replace(checked, divergence=_divergence(plan, folder)) if kl_divergence else checked


def _divergence(plan: Plan, folder: Path) -> Divergence:
    """In the staging folder, so that a killed export leaves nothing else."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        plain = Path(scratch) / "plain"
        export_model(plan.adapter.path, plan.base, plain, dtype=plan.dtype, certificate=False)
        return compare(plain, folder)


def _scan(plan: Plan) -> Scan:
    weights = plan.adapter.path / peftdir.WEIGHTS
    scanned = scan(weights, list(plan.adapter.tensors.values()))
    if scanned.not_finite:
        raise AdapterError(
            f"{weights} is broken",
            why=f"{scanned.not_finite} holds NaN or infinite values",
            hint="train it again with a lower learning rate",
        )
    return scanned


def _key(plan: Plan, scanned: Scan) -> str:
    """What the weights in a staging folder are made from: files of the same key can be gone on with."""
    stats = [(file, file.stat()) for file in plan.base.weight_files]
    made_from = {
        "base": [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "adapter": scanned.sha256,
        "config": dict(plan.adapter.config),
        "files": {file.name: hashlib.sha256(file.header).hexdigest() for file in plan.files},  # dtypes, shards
        "adapterhub": adapterhub.__version__,
    }
    return hashlib.sha256(canonical_json(made_from)).hexdigest()


def _write_certificate(
    plan: Plan, checked: Certificate, folder: Path, *, record: Record | None, made_of: Sequence[str], scanned: Scan
) -> None:
    document = {
        "format": proof.FORMAT,
        "adapterhub": adapterhub.__version__,
        "adapter": {
            "ref": str(record.ref) if record else None,
            "digest": record.digest if record else None,
            "made_of": list(made_of),
            "weights_sha256": scanned.sha256,
        },
        "base": to_plain(plan.base.fingerprint),
        "base_precision": plan.base_precision,
        "dtype": plan.dtype,
        "quantize": plan.scheme.name if plan.scheme else None,
        "group_size": plan.scheme.group or None if plan.scheme else None,
        **checked.to_json(),
        "files": proof.hash_files(folder),
    }
    (folder / proof.FILE).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
