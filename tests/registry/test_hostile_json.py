"""Whatever somebody writes into a registry or a bundle is read, or refused: no other exception ever comes out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import IntegrityError, Unsupported
from adapterhub.manifest import (
    BaseFingerprint,
    FileEntry,
    LoraShape,
    Manifest,
    Record,
    Verdict,
    Verdicts,
    canonical_json,
    to_plain,
)
from adapterhub.refs import AdapterName
from adapterhub.registry import entries
from adapterhub.registry.base import ChannelMove, Evaluation, Signature, StatusChange, Target, Version
from adapterhub.registry.moving.bundle_index import Bundled, BundledBase, Index, from_bytes, to_bytes
from adapterhub.registry.moving.copying import Original

YES = Verdict("yes")
DIGEST = "sha256:" + "a" * 64
FILES = (FileEntry("adapter_config.json", 2, "a" * 64), FileEntry("adapter_model.safetensors", 9, "b" * 64))
BASE = BaseFingerprint("tiny", "1" * 64, "2" * 64, "3" * 64, "BF16", 1000)
MANIFEST = Manifest(FILES, LoraShape(4, 8.0, ("q_proj",), 10, "F32"), base=BASE)
RECORD = Record(
    AdapterName("acme", "support"),
    3,
    MANIFEST.digest,
    MANIFEST,
    "p",
    "2026-01-01T00:00:00+00:00",
    "ana",
    Verdicts(YES, YES, YES),
)
EVALUATION = Evaluation(1, "heldout", {"score": 0.5}, {"n": 1}, "eve", "2026-01-01T00:00:00+00:00")
MOVE = ChannelMove("prod", 1, (Target(3, DIGEST),), "set", "", "ana", "2026-01-01T00:00:00+00:00", "op")
BUNDLED = Bundled(Original(Version(RECORD), (EVALUATION,), (Signature("c" * 64, b"{}"),)), "prod")
INDEX = Index((BUNDLED,), BundledBase("tiny", (FileEntry("config.json", 2, "d" * 64),)))

Reader = Callable[[bytes], object]
READERS: dict[str, tuple[bytes, Reader]] = {
    "record": (RECORD.to_bytes(), Record.from_bytes),
    "move": (entries.move_to_bytes(MOVE), lambda data: entries.move_from_bytes(data, key="k")),
    "status": (
        entries.status_to_bytes(StatusChange(1, "yanked", "", "ana", "2026")),
        lambda data: entries.status_from_bytes(data, key="k"),
    ),
    "evaluation": (
        entries.evaluation_to_bytes(EVALUATION),
        lambda data: entries.evaluation_from_bytes(data, key="k"),
    ),
    "bundle": (to_bytes(INDEX), from_bytes),
}

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.just("../x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path into a JSON value."""
    found = [above] if above else []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        found += places(inner, (*above, key))
    return found


@pytest.mark.parametrize("name", READERS)
def test_what_is_sound_is_read(name: str) -> None:
    data, read = READERS[name]
    read(data)


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
def test_any_change_is_read_or_refused(name: str, data: st.DataObject) -> None:
    sound, read = READERS[name]
    raw = json.loads(sound)
    changed = copy.deepcopy(raw)
    path = data.draw(st.sampled_from(places(raw)))
    place = changed
    for key in path[:-1]:
        place = place[key]
    if isinstance(place, dict) and data.draw(st.booleans()):
        del place[path[-1]]
    else:
        place[path[-1]] = data.draw(values)
    manifest = changed.get("manifest") if name == "record" else None
    if isinstance(manifest, dict):  # as an attacker would: the digest fits
        import hashlib

        changed["digest"] = "sha256:" + hashlib.sha256(canonical_json(manifest)).hexdigest()
    try:
        found = read(canonical_json(changed))
    except (IntegrityError, Unsupported):
        return
    to_plain(found)
    repr(found)
    if isinstance(found, Record):
        assert isinstance(found.author + found.created + found.manifest.lora.dtype, str)
        assert found.manifest.size + found.manifest.lora.rank + found.manifest.lora.alpha is not None


@pytest.mark.parametrize("name", READERS)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(name: str, data: bytes) -> None:
    try:
        READERS[name][1](data)
    except (IntegrityError, Unsupported):
        return
