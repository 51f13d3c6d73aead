from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.errors import ConfigError
from adapterhub.settings import load_settings


def write(home: Path, text: str) -> dict[str, str]:
    (home / "config.toml").write_text(text)
    return {"AH_HOME": str(home)}


def test_defaults_lie_under_the_home(tmp_path: Path) -> None:
    settings = load_settings({"AH_HOME": str(tmp_path / "my home")})
    assert settings.registry == (tmp_path / "my home" / "registry").as_uri()
    assert settings.cache == tmp_path / "my home" / "cache"
    assert settings.base is None
    assert settings.author


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    environment = write(tmp_path, '[adapterhub]\nregistry = "file:///from-file"\nbase = "org/base"\nauthor = "ana"\n')
    assert load_settings(environment).registry == "file:///from-file"
    assert load_settings(environment | {"AH_REGISTRY": "file:///from-env"}).registry == "file:///from-env"
    assert load_settings(environment | {"AH_REGISTRY": ""}).registry == "file:///from-file"
    assert load_settings(environment).base == "org/base"
    assert load_settings(environment).author == "ana"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[adapterhub]\nregistri = "x"', "registri"),
        ("[adapterhub]\nregistry = 3", "must be text"),
        ("[adapterhub\n", "not TOML"),
    ],
)
def test_a_broken_file_is_named_with_the_reason(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        load_settings(write(tmp_path, text))
    assert "config.toml" in refused.value.what


def test_other_tables_belong_to_others(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, "[other]\nx = 1\n")).base is None
