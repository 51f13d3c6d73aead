"""The base model on disk: where it is, what its tensors are, and its fingerprint. No torch.

A base is named by a folder or by a Hub id. Its fingerprint reads the first and last 64 KiB of every tensor, so a
different model of the same shape is seen within a second, whatever its size.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from adapterhub import names, peftdir
from adapterhub.errors import AdapterError, BaseMismatch, NotFound, StorageError
from adapterhub.manifest import BaseFingerprint, canonical_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_EDGE = 65_536  # bytes hashed at each end of a tensor
_VALUES = 16_384  # elements compared at each end, whatever the dtype: 64 KiB of float32
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class BaseModel:
    """A base model folder: ``config.json``, tokenizer, one or more safetensors files."""

    name: str  # as it was asked for: Hub id, or the folder's name
    path: Path
    commit: str | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        return _read_json(self.path / "config.json")

    @cached_property
    def tensors(self) -> Mapping[str, tuple[Path, peftdir.Tensor]]:
        """Every tensor of the checkpoint: name → (file, header entry), in name order."""
        try:
            found = {t.name: (file, t) for file in self.weight_files for t in peftdir.read_header(file)}
        except AdapterError as error:
            raise StorageError(error.what, why=error.why, hint="fetch the base model again") from error
        return dict(sorted(found.items()))

    @cached_property
    def weight_map(self) -> Mapping[str, str] | None:
        """Tensor → file name, from the index of a sharded checkpoint; None where one file holds all."""
        index = self.path / INDEX
        if (self.path / SINGLE).is_file() or not index.is_file():  # transformers looks in this order too
            return None
        found = _read_json(index).get("weight_map")
        if not isinstance(found, dict) or not all(_is_plain_name(name) for name in found.values()):
            raise StorageError(
                f"{index} is broken",
                why="its weight_map must name files of its own folder",
                hint="fetch the base model again",
            )
        return found

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files that the index names, or the only ones there are."""
        if self.weight_map is not None:
            return tuple(self.path / name for name in sorted(set(self.weight_map.values())))
        if (self.path / SINGLE).is_file():
            return (self.path / SINGLE,)
        return tuple(sorted(self.path.glob("*.safetensors")))

    def weight_of(self, module: str) -> peftdir.Tensor | None:
        """The tensor that holds a module's weight: ``model.layers.0.mlp.up_proj`` → its header entry.

        A tied head's is the embedding's. Of an architecture that `names` does not know, names are taken as they are.
        """
        line = self._names
        if line and module == line.head and names.tied(self.config):
            module = line.embedding
        for name in line.stored(module) if line else (module,):
            if f"{name}.weight" in self.tensors:
                return self.tensors[f"{name}.weight"][1]
        return None

    @property
    def _names(self) -> names.Architecture | None:
        return names.ARCHITECTURES.get(str(self.config.get("model_type")))

    def _holds_experts(self, module: str) -> bool:
        """Whether it is a module of fused experts that this base has; the plan of an export looks at their shapes."""
        match = names.FUSED.fullmatch(module)
        found = self._names.expert_tensors(match["module"]) if match and self._names else ()
        return any(name in self.tensors for name in found)

    @cached_property
    def fingerprint(self) -> BaseFingerprint:
        """Told from the weights; reads about 128 KiB a tensor."""
        layout, content, values = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        dtypes: Counter[str] = Counter()
        files: dict[Path, BinaryIO] = {}
        try:
            for name, (path, tensor) in self.tensors.items():
                file = files.get(path) or files.setdefault(path, path.open("rb"))
                elements = int(np.prod(tensor.shape, dtype=np.int64))
                dtypes[tensor.dtype] += elements
                layout.update(canonical_json([name, list(tensor.shape)]))
                content.update(canonical_json([name, tensor.dtype]))
                for part in _edges(file, tensor, _EDGE):
                    content.update(part)
                width = max(1, (tensor.end - tensor.start) // max(1, elements))
                for part in _edges(file, tensor, _VALUES * width):
                    values.update(_as_bfloat16(part, tensor.dtype))
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read", why=str(error)) from error
        finally:
            for file in files.values():
                file.close()
        return BaseFingerprint(
            name=self.name,
            layout=layout.hexdigest(),
            content=content.hexdigest(),
            values=values.hexdigest(),
            dtype=dtypes.most_common(1)[0][0],
            parameters=sum(dtypes.values()),
            commit=self.commit,
        )

    def check(self, recorded: BaseFingerprint, *, what: str) -> str:
        """A note for people, empty where the match is exact. Raises BaseMismatch."""
        answer = recorded.match(self.fingerprint)
        if answer == "mismatch":
            raise BaseMismatch(
                f"{what} was trained on another base than {self.name}",
                why=f"it was trained on {recorded.name} ({recorded.content[:12]}), "
                f"this is {self.fingerprint.content[:12]}",
                hint=f"use --base {recorded.name}",
            )
        if answer == "dtype":
            return f"{what} was trained on the same base in {recorded.dtype}; this copy is {self.fingerprint.dtype}"
        return ""

    def check_factors(self, adapter: peftdir.PeftDir) -> None:
        """Every factor must fit a weight of this base, or it would load and change nothing. Raises BaseMismatch."""
        for factor in adapter.factors:
            weight = self.weight_of(factor.module)
            if weight is None and self._holds_experts(factor.module):
                continue
            if weight is None:
                raise BaseMismatch(
                    f"{adapter.path} does not match the base {self.name}",
                    why=f"the base has no weight for {factor.module}",
                    hint="name the base that it was trained on with --base",
                )
            if not self._fits(weight, (factor.b.shape[0], factor.a.shape[1])):
                raise BaseMismatch(
                    f"{adapter.path} does not match the base {self.name}",
                    why=f"{factor.module} is {list(weight.shape)} there, the adapter makes "
                    f"{[factor.b.shape[0], factor.a.shape[1]]}",
                    hint="name the base that it was trained on with --base",
                )

    def _fits(self, weight: peftdir.Tensor, made: tuple[int, int]) -> bool:
        """Either way round: some models keep weights as (in, out)."""
        if f"{weight.name}.absmax" in self.tensors:  # bitsandbytes' 4 bits: two weights in a byte, without their shape
            return weight.end - weight.start == (made[0] * made[1] + 1) // 2
        return sorted(weight.shape) == sorted(made)


def find_base(name: str, *, revision: str | None = None) -> BaseModel:
    """A base by folder or Hub id; a Hub id is fetched into the Hub's own cache.

    Raises:
        NotFound: no such folder or repository, or a folder that holds no model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(BaseModel(name=folder.resolve().name, path=folder.resolve()))
    if not _HUB_ID.fullmatch(name):
        raise NotFound(
            f"the base {name!a} was not found",
            why="there is no such folder, and it is no Hub id (org/model)",
            hint="name a model folder, or a Hub id like Qwen/Qwen3-0.6B",
        )
    path = _from_hub(name, revision)
    commit = path.name if re.fullmatch(r"[0-9a-f]{40}", path.name) else None
    return _checked(BaseModel(name=name, path=path, commit=commit))


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise NotFound(
            f"the base {name} was not found",
            why=f"there is no such folder, and the Hub says: {str(error).strip().splitlines()[0]}",
            hint="check the spelling, log in with `hf auth login`, or name a model folder",
        ) from error


def _checked(base: BaseModel) -> BaseModel:
    missing = "config.json" if not (base.path / "config.json").is_file() else ""
    missing = missing or ("safetensors weights" if not base.weight_files else "")
    if missing:
        raise NotFound(
            f"{base.path} is not a model folder",
            why=f"it has no {missing}",
            hint="name a folder that save_pretrained wrote",
        )
    return base


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise StorageError(f"{path} cannot be read", why=error.strerror or str(error)) from error
    except ValueError as error:
        raise StorageError(f"{path} is not JSON", why=str(error), hint="fetch the base model again") from error
    if not isinstance(data, dict):
        raise StorageError(f"{path} is broken", why="it is no JSON object", hint="fetch the base model again")
    return data


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name not in {"", ".", ".."} and not set(name) & set("/\\\0")


def _edges(file: BinaryIO, tensor: peftdir.Tensor, count: int) -> tuple[bytes, bytes]:
    """The first and the last ``count`` bytes of a tensor."""
    length = min(count, tensor.end - tensor.start)
    file.seek(tensor.start)
    first = file.read(length)
    file.seek(tensor.end - length)
    return first, file.read(length)


def _as_bfloat16(raw: bytes, dtype: str) -> bytes:
    """The values rounded to bfloat16 (nearest, ties to even); dtypes without an exact float32 stay as they are."""
    if dtype == "F32":
        bits = np.frombuffer(raw, dtype="<u4")
    elif dtype == "F16":
        bits = np.frombuffer(raw, dtype="<f2").astype("<f4").view("<u4")
    else:
        return raw
    rounded: bytes = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return rounded
