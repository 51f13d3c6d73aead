"""Writes an adapter that we made ourselves: plain LoRA of scale 1, as a run's folder that `ah publish` takes.

    TO/run.json                    the base and the lineage
    TO/adapter/adapter_config.json, adapter_model.safetensors, and what its maker puts beside them

alpha = rank everywhere, so that no reader can scale it in another way (docs/decisions/0016).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adapterhub.errors import AlreadyExists, StorageError
from adapterhub.peftdir import CONFIG, WEIGHTS
from adapterhub.runrecord import ADAPTER, FILE, RunRecord

Factors = Mapping[str, tuple[Any, Any]]  # module → A (rank, in), B (out, rank), torch tensors


def refuse_taken(to: Path) -> None:
    """Raises AlreadyExists."""
    if to.exists() or to.is_symlink():
        raise AlreadyExists(f"{to} exists", hint="name a new folder with --to")


def write_run(
    to: Path,
    factors: Factors,
    *,
    record: RunRecord,
    task_type: str | None,
    base_name: str | None,
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the new folder ``to`` whole or not at all. ``beside`` puts more files into its adapter folder.

    Raises AlreadyExists, StorageError.
    """
    from safetensors.torch import save_file

    refuse_taken(to)
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.float().contiguous()
    config = plain_config({module: a.shape[0] for module, (a, _) in factors.items()})
    config |= {"task_type": task_type, "base_model_name_or_path": base_name}
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
        try:
            folder = hidden / ADAPTER
            folder.mkdir()
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            beside(folder)
            record.write(hidden / FILE)
            hidden.chmod(0o777 & ~_umask())
            hidden.rename(to)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{to} cannot be written", why=error.strerror or str(error)) from error


def plain_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's config of scale 1 for every module, also for a reader that knows no patterns."""
    largest = max(ranks.values())
    other = {module.replace(".", r"\."): rank for module, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "bias": "none",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
    }


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
