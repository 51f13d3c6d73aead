"""Progress tells every byte once."""

from __future__ import annotations

import io
from typing import Any

from adapterhub.refs import AdapterName
from adapterhub.registry import ObjectRegistry
from adapterhub.registry.counted import Counted


def test_what_is_read_again_is_not_told_again() -> None:
    told: list[int] = []
    stream = Counted(io.BytesIO(bytes(100)), told.append)
    stream.read(60)
    assert stream.seekable()
    stream.seek(0)
    stream.read(30)
    stream.read()
    stream.tell_until(100)
    assert told == [60, 40]


def test_a_publish_tells_all_bytes_also_of_what_is_there(
    registry: ObjectRegistry, new_draft: Any, name: AdapterName
) -> None:
    for _ in range(2):
        told: list[int] = []
        draft = new_draft("the same")
        registry.publish(draft, name=name, author="ana", progress=told.append)
        assert sum(told) == draft.manifest.size
