"""What a version *is*: the content manifest, and the record that a registry wraps around it.

The **manifest** speaks of bytes only: files, LoRA shape, base fingerprint, template, lineage. It is written as
canonical JSON, and the sha256 of that text is the version's **digest**: a copy in another registry has the same.
The **record** adds what one registry knows: name, number, time, author, verdicts, labels.

No I/O here. What was read is written again as it came, unknown fields included, so an older program passes on what
a newer one wrote; an unknown major format is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import Any, Literal

from adapterhub.errors import IntegrityError, InvalidName, Unsupported
from adapterhub.refs import AdapterName, AdapterRef

FORMAT = 1
MAX_JSON = 4 * 2**20  # bytes of one record, log entry or signature: nothing of ours comes near it

Answer = Literal["yes", "no", "unknown"]
Json = Mapping[str, Any]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_EPOCH = re.compile(r"[0-9]{13}-[0-9a-f]{8}")
# What no part of a file's path may hold, so that it names the same file everywhere: separators and streams of Windows,
# control characters, and the dots and spaces at the end that Windows drops.
_BAD_PART = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]|[. ]$|^$')


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parse_json(data: bytes, *, what: str, limit: int = MAX_JSON) -> Any:
    """Read JSON that somebody else may have written. Raises IntegrityError for what is too large, too deep or none."""
    if len(data) > limit:
        raise IntegrityError(f"{what} is too large to be read", why=f"it has {len(data)} bytes, allowed are {limit}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{what} cannot be read", why=str(error)) from error


@dataclass(frozen=True)
class FileEntry:
    """One file of a version. ``path`` is relative, with ``/``, and never leaves the folder, on any system."""

    path: str
    size: int  # bytes
    sha256: str  # 64 hex digits

    def __post_init__(self) -> None:
        if any(_BAD_PART.search(part) for part in self.path.split("/")):  # also . and ..
            raise IntegrityError(
                f"the manifest names the file {self.path[:200]!a}", why="it would leave the version's folder somewhere"
            )
        if not _SHA256.fullmatch(self.sha256) or type(self.size) is not int or self.size < 0:  # the hash becomes a key
            raise IntegrityError(f"the manifest's entry for {self.path!a} is broken")


@dataclass(frozen=True)
class LoraShape:
    """The shape of an adapter, from its config and the headers of its tensors."""

    rank: int  # the largest of all modules
    alpha: float  # the config's lora_alpha
    target_modules: tuple[str, ...]  # last part of the module names, sorted: ("down_proj", "q_proj")
    parameters: int  # elements of all A and B (and of modules to save)
    dtype: str  # safetensors' name, e.g. "F32", "BF16"; "mixed" where they differ
    rslora: bool = False
    variant: str = "lora"  # "lora", "dora", …


@dataclass(frozen=True)
class BaseFingerprint:
    """Which base model an adapter was trained on, told from its weights rather than its name.

    ``layout`` hashes tensor names and shapes; ``content`` the first and last 64 KiB of every tensor;
    ``values`` the same elements rounded to bfloat16, equal for a copy of the same model in another dtype.
    """

    name: str  # Hub id or folder name, for people
    layout: str
    content: str
    values: str
    dtype: str  # of most parameters, safetensors' name
    parameters: int
    commit: str | None = None  # the Hub's, where known

    def match(self, other: BaseFingerprint) -> Literal["exact", "dtype", "mismatch"]:
        """``exact``: the same weights. ``dtype``: the same model stored in another dtype. Else ``mismatch``."""
        if self.content == other.content and self.layout == other.layout:
            return "exact"
        if self.values == other.values and self.layout == other.layout and self.dtype != other.dtype:
            return "dtype"
        return "mismatch"


@dataclass(frozen=True)
class Lineage:
    """Where the weights came from."""

    method: str = ""  # "sft", "dpo", …; empty where unknown
    parents: tuple[str, ...] = ()  # digests of versions that this one was made from
    config_sha256: str = ""  # of the resolved training config
    data_sha256: tuple[str, ...] = ()  # of each data file
    seed: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)  # final: eval_loss, train_loss, …
    environment: Mapping[str, str] = field(default_factory=dict)  # package → version


@dataclass(frozen=True)
class Manifest:
    """The content of a version. Its digest is the sha256 of `to_bytes`."""

    files: tuple[FileEntry, ...]
    lora: LoraShape
    base: BaseFingerprint | None = None  # None: not at hand when it was published, and not recorded by training
    chat_template_sha256: str = ""
    tokenizer_sha256: str = ""
    lineage: Lineage = Lineage()
    read_from: Json | None = field(default=None, compare=False, repr=False)  # keeps fields unknown to us

    def __post_init__(self) -> None:
        check_distinct([f.path for f in self.files])

    def to_json(self) -> dict[str, Any]:
        if self.read_from is not None:
            return dict(self.read_from)
        return {
            "format": FORMAT,
            "files": [to_plain(f) for f in sorted(self.files, key=lambda f: f.path)],
            "lora": to_plain(self.lora),
            "base": to_plain(self.base) if self.base else None,
            "chat_template_sha256": self.chat_template_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "lineage": to_plain(self.lineage),
        }

    def to_bytes(self) -> bytes:
        return canonical_json(self.to_json())

    @property
    def digest(self) -> str:
        """``sha256:`` and 64 hex digits."""
        return "sha256:" + hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def size(self) -> int:
        """All files, in bytes."""
        return sum(f.size for f in self.files)

    @classmethod
    def from_json(cls, data: Json) -> Manifest:
        """Raises Unsupported for a newer major format, IntegrityError for a broken one."""
        _check_format(data, "manifest")
        try:
            base = data.get("base")
            return cls(
                files=tuple(from_plain(FileEntry, f) for f in data["files"]),
                lora=from_plain(LoraShape, data["lora"]),
                base=from_plain(BaseFingerprint, base) if base else None,
                chat_template_sha256=data.get("chat_template_sha256", ""),
                tokenizer_sha256=data.get("tokenizer_sha256", ""),
                lineage=from_plain(Lineage, data.get("lineage", {})),
                read_from=data,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError("a manifest cannot be read", why=repr(error)) from error


@dataclass(frozen=True)
class Verdict:
    """Whether a version can be used for one thing, and why (not)."""

    answer: Answer
    reason: str = ""
    engine: str = ""  # what the answer speaks of: "vllm 0.32"


@dataclass(frozen=True)
class Verdicts:
    """Decided once, at publish time."""

    serve: Verdict
    merge: Verdict
    gguf: Verdict


@dataclass(frozen=True)
class Record:
    """One published version in one registry. Never changes."""

    name: AdapterName
    version: int
    digest: str
    manifest: Manifest
    publish_id: str
    created: str  # ISO 8601, UTC, seconds
    author: str
    verdicts: Verdicts
    labels: Mapping[str, str] = field(default_factory=dict)
    epochs: Mapping[str, str] = field(default_factory=dict)  # sha256 → where its bytes are (`registry.lifecycle`)
    read_from: Json | None = field(default=None, compare=False, repr=False)

    @cached_property  # of one value that never changes: asked for several times by every request that is served
    def ref(self) -> AdapterRef:
        return AdapterRef(self.name, version=self.version)

    def to_json(self) -> dict[str, Any]:
        if self.read_from is not None:
            return dict(self.read_from)
        epochs = {"epochs": dict(self.epochs)} if self.epochs else {}
        return epochs | {
            "format": FORMAT,
            "tenant": self.name.tenant,
            "adapter": self.name.adapter,
            "version": self.version,
            "digest": self.digest,
            "manifest": self.manifest.to_json(),
            "publish_id": self.publish_id,
            "created": self.created,
            "author": self.author,
            "verdicts": to_plain(self.verdicts),
            "labels": dict(self.labels),
        }

    def to_bytes(self) -> bytes:
        return canonical_json(self.to_json())

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """Raises IntegrityError where the digest is not the manifest's, Unsupported for a newer major format."""
        raw = parse_json(data, what="a version's record")
        try:
            _check_format(raw, "record")
            verdicts = {k: from_plain(Verdict, raw["verdicts"][k]) for k in ("serve", "merge", "gguf")}
            record = cls(
                name=AdapterName(raw["tenant"], raw["adapter"]),
                version=raw["version"],
                digest=raw["digest"],
                manifest=Manifest.from_json(raw["manifest"]),
                publish_id=raw["publish_id"],
                created=raw["created"],
                author=raw["author"],
                verdicts=Verdicts(**verdicts),
                labels=raw.get("labels", {}),
                epochs=raw.get("epochs", {}),
                read_from=raw,
            )
            if not (
                all(map(_is_text, (record.publish_id, record.created, record.author))) and _is_labels(record.labels)
            ):
                raise TypeError("its author, time or labels are no text")
            if not (_is_labels(record.epochs) and all(map(_EPOCH.fullmatch, record.epochs.values()))):
                raise TypeError("its epochs are none")  # they become keys
            ref, digest = record.ref, record.manifest.digest
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidName) as error:
            raise IntegrityError("a version's record cannot be read", why=repr(error)) from error
        if digest != record.digest:
            raise IntegrityError(
                f"the record of {ref} does not match its digest",
                why=f"it says {str(record.digest)[:100]}, its manifest is {digest}",
            )
        return record


def check_distinct(paths: list[str]) -> None:
    """No two files in one place, also where upper and lower case are the same, and no file where a folder must be.

    Raises IntegrityError.
    """
    files = {path.casefold() for path in paths}
    folders = {path[:i] for path in files for i, letter in enumerate(path) if letter == "/"}
    if len(files) != len(paths) or files & folders:
        raise IntegrityError("the manifest names two files in one place", why=", ".join(sorted(paths))[:200])


def _check_format(data: Json, what: str) -> None:
    found = data.get("format")
    if not isinstance(found, int):
        raise IntegrityError(f"a {what} has no format number")
    if found > FORMAT:
        raise Unsupported(
            f"a {what} has format {found}, this AdapterHub reads up to {FORMAT}",
            why="it was written by a newer AdapterHub",
            hint="pip install --upgrade adapterhub",
        )


def to_plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists."""
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    return value


def from_plain(cls: Any, data: Json) -> Any:
    """A flat dataclass from JSON: lists become tuples. Fields it does not know stay out.

    Raises TypeError where a field without a default is missing, or one is of another type.
    """
    checks = _checks(cls)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in checks}
    for name, value in values.items():
        if not checks[name](value):
            raise TypeError(f"{cls.__name__}.{name} is {str(value)[:50]!a}")
    return cls(**values)


@cache
def _checks(cls: Any) -> dict[str, Callable[[Any], bool]]:
    """Field → whether a value is of its type; the types that JSON has."""
    return {f.name: _TYPES.get(str(f.type), lambda value: True) for f in fields(cls)}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_map(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(_is_text, value)) and all(map(of, value.values()))


_is_labels = _is_map(_is_text)
_TYPES: dict[str, Callable[[Any], bool]] = {
    "str": _is_text,
    "int": _is_whole,
    "float": _is_number,
    "bool": lambda value: isinstance(value, bool),
    "str | None": lambda value: value is None or _is_text(value),
    "int | None": lambda value: value is None or _is_whole(value),
    "tuple[str, ...]": lambda value: isinstance(value, tuple) and all(map(_is_text, value)),
    "Mapping[str, str]": _is_map(_is_text),
    "Mapping[str, float]": _is_map(_is_number),
    "Mapping[str, Any]": _is_map(lambda value: True),
}
