"""What runs inside vLLM: inert by default, and no server without protection."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from adapterhub import peftdir
from adapterhub.base import BaseModel
from adapterhub.errors import EngineError, UsageError
from adapterhub.serving import plugin, selftest
from adapterhub.serving.arguments import MIDDLEWARE
from adapterhub.serving.config import ServeConfig
from adapterhub.serving.middleware import TenancyMiddleware


def arguments(**changed: Any) -> Namespace:
    fine = {
        "host": "127.0.0.1", "api_server_count": 1, "data_parallel_size": 1, "enable_lora": True,
        "middleware": [MIDDLEWARE],
    }  # fmt: skip
    return Namespace(**(fine | changed))


def test_in_a_vllm_that_is_not_ours_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTERHUB_SERVE", raising=False)
    plugin.register()
    endpoints, app = plugin.Endpoints(), FastAPI()
    before = list(app.routes)
    endpoints.attach_router(app)
    asyncio.run(endpoints.init_state(None, app.state, Namespace()))
    assert app.routes == before
    assert not hasattr(app.state, "adapterhub")


def test_it_takes_its_settings_from_the_environment(config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in config.to_env().items():
        monkeypatch.setenv(name, value)
    app = FastAPI()
    plugin.Endpoints().attach_router(app)
    assert {"/v1/models", "/ready", "/adapterhub/state", "/adapterhub/poll"} <= {r.path for r in app.routes}  # type: ignore[attr-defined]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    plugin.check_arguments(arguments(host=host), {})


@pytest.mark.parametrize("host", [None, "", "0.0.0.0", "::", "192.168.1.4", "server.example", "localhost.example"])
def test_any_other_address_is_refused(host: str | None) -> None:
    with pytest.raises(UsageError, match="without keys"):
        plugin.check_arguments(arguments(host=host), {})


@pytest.mark.parametrize(
    "changed",
    [{"api_server_count": 2}, {"data_parallel_size": 4}, {"enable_lora": False}, {"middleware": []}],
)
def test_flags_that_would_mix_tenants_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        plugin.check_arguments(arguments(**changed), {})


@pytest.mark.parametrize(
    "name", ["VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SERVER_DEV_MODE", "VLLM_SKIP_MODEL_NAME_VALIDATION"]
)
def test_back_doors_in_the_environment_are_refused(name: str) -> None:
    for value in ("1", "true", "True"):
        with pytest.raises(UsageError, match=name):
            plugin.check_arguments(arguments(), {name: value})
    plugin.check_arguments(arguments(), {name: "0"})


def test_the_self_test_sees_a_missing_middleware() -> None:
    app = FastAPI()
    app.add_api_route("/metrics", lambda: {}, methods=["GET"])
    with pytest.raises(EngineError, match="/metrics is open"):
        asyncio.run(selftest.check_shield(app))
    protected = FastAPI()
    protected.add_api_route("/metrics", lambda: {}, methods=["GET"])
    protected.add_middleware(TenancyMiddleware)
    asyncio.run(selftest.check_shield(protected))


def test_the_self_tests_adapter_is_one_that_any_base_like_ours_takes(base: BaseModel, tmp_path: Path) -> None:
    targets = selftest.targets_of(base)
    assert {name.rsplit(".", 1)[-1] for name in targets} == {"o_proj", "down_proj"}
    selftest.write_probe(tmp_path, targets)
    adapter = peftdir.read(tmp_path)
    base.check_factors(adapter)
    assert peftdir.verdicts(adapter).serve.answer == "yes"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == adapter.shape.rank == 1
