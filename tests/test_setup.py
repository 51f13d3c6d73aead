"""The set-up script hands the caller's pip settings on to uv."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "setup_env.py"


@pytest.fixture(scope="module")
def setup_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pip_settings_become_uv_settings(setup_env: ModuleType) -> None:
    listed = "\n".join([
        "global.index-url='https://mirror.example/simple'",
        "global.extra-index-url='https://a.example/simple https://b.example/simple'",
        "global.find-links='/one'",
        ":env:.find-links='/two /three'",
        "freeze.timeout='10'",
        "global.cert='/etc/ca.pem'",
    ])  # fmt: skip
    settings = setup_env.parse_pip_config(listed)
    assert setup_env.uv_environment(settings, {}) == {
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/two,/three",
        "SSL_CERT_FILE": "/etc/ca.pem",
    }


def test_what_the_caller_set_for_uv_stays(setup_env: ModuleType) -> None:
    settings = {"index-url": ["https://mirror.example/simple"]}
    assert setup_env.uv_environment(settings, {"UV_DEFAULT_INDEX": "https://mine.example"}) == {}


@pytest.mark.parametrize(("value", "expected"), [("true", {"UV_NO_INDEX": "true"}), ("false", {})])
def test_no_index_is_a_switch(setup_env: ModuleType, value: str, expected: dict[str, str]) -> None:
    assert setup_env.uv_environment({"no-index": [value]}, {}) == expected


def test_a_wheel_folder_with_the_cpu_torch_needs_no_other_index(setup_env: ModuleType, tmp_path: Path) -> None:
    assert not setup_env.holds_cpu_torch([str(tmp_path), "https://wheels.example/"])
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    assert setup_env.holds_cpu_torch([tmp_path.as_uri()])


def test_a_changed_requirement_changes_the_state(setup_env: ModuleType) -> None:
    assert setup_env.state("cpu") == setup_env.state("cpu") != setup_env.state("gpu")
