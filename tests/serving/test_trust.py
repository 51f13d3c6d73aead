"""A server that serves only what was signed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.base import BaseModel
from adapterhub.errors import Untrusted
from adapterhub.manifest import Record
from adapterhub.refs import AdapterRef
from adapterhub.registry import Registry
from adapterhub.registry.signing import sign
from adapterhub.serving.adapters.residency import Engine
from adapterhub.serving.config import ServeConfig
from adapterhub.serving.replica import Replica

Keys = dict[str, tuple[Path, Path]]
pytestmark = pytest.mark.anyio


@pytest.fixture
def strict(config: ServeConfig, registry: Registry, base: BaseModel, engine: Engine, keys: Keys) -> Replica:
    config = replace(config, require_signed_by=(keys["ana"][1],))
    replica = Replica(config, registry=registry, base=base, engine=engine)
    replica.not_ready = ""
    return replica


async def test_an_unsigned_version_is_not_loaded(strict: Replica, publish: Callable[..., Record], keys: Keys) -> None:
    record = publish()
    with pytest.raises(Untrusted, match="nobody signed it") as refused:
        await strict.residency.ensure(record)
    assert refused.value.status == 422
    assert not strict.config.cache.exists()
    sign(strict.registry, record, key=keys["ana"][0])
    await strict.residency.ensure(record)
    assert strict.residency.places.resident


async def test_a_channel_stays_where_it_was_until_the_new_version_is_signed(
    strict: Replica, publish: Callable[..., Record], keys: Keys
) -> None:
    sign(strict.registry, publish(channel="prod"), key=keys["ana"][0])
    ref = AdapterRef.parse("acme/support@prod")
    assert (await strict.rollout.current(ref)).record.version == 1
    second = publish(channel="prod")
    await strict.poll()
    assert (await strict.rollout.current(ref)).record.version == 1
    assert "nobody signed it" in strict.state()["references"][0]["problem"]
    sign(strict.registry, second, key=keys["ana"][0])
    await strict.poll()
    assert (await strict.rollout.current(ref)).record.version == 2


def test_the_engines_process_is_told_the_keys(config: ServeConfig, keys: Keys) -> None:
    told = replace(config, require_signed_by=(keys["ana"][1], keys["ben"][1]))
    assert ServeConfig.from_env(told.to_env()) == told
