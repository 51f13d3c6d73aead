"""User settings: defaults < ``$AH_HOME/config.toml`` < environment < flags.

    [adapterhub]                     environment      flag
    registry = "file:///srv/reg"     AH_REGISTRY      --registry
    cache = "/srv/ah-cache"          AH_CACHE
    base = "Qwen/Qwen3-0.6B"         AH_BASE          --base
    author = "ana@acme.example"      AH_AUTHOR
    require_signed_by = "/k/a.pub"   AH_REQUIRE_SIGNED_BY   --require-signed-by
    database_url = "postgresql://…"  AH_DATABASE_URL   tenants, keys and usage; default adapterhub.db in AH_HOME
    redis_url = "redis://host/0"     AH_REDIS_URL      limits that several servers count together
    webhook_secret = "…"             AH_WEBHOOK_SECRET   signs what `ah serve --webhook` sends

``AH_HOME`` is ``~/.adapterhub`` unless set.
"""

from __future__ import annotations

import getpass
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from adapterhub.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """What a command runs with, before its own flags."""

    home: Path
    registry: str  # URL
    cache: Path  # verified local copies of versions
    base: str | None = None  # default of --base: folder or Hub id
    author: str = ""  # who publishes and moves channels
    require_signed_by: tuple[Path, ...] = ()  # public keys; one of them must have signed what is used
    database_url: str | None = None  # None: adapterhub.db in `home`
    redis_url: str | None = None
    webhook_secret: str | None = None


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the file and the environment once. Raises ConfigError."""
    home = Path(environ.get("AH_HOME") or "~/.adapterhub").expanduser().absolute()
    values = _read_file(home / "config.toml")
    values |= {key: environ[f"AH_{key.upper()}"] for key in _KEYS if environ.get(f"AH_{key.upper()}")}
    return Settings(
        home=home,
        registry=values.get("registry") or (home / "registry").as_uri(),
        cache=Path(values.get("cache") or home / "cache").expanduser().absolute(),
        base=values.get("base"),
        author=values.get("author") or _login(),
        require_signed_by=_paths(values.get("require_signed_by", "")),
        database_url=values.get("database_url"),
        redis_url=values.get("redis_url"),
        webhook_secret=values.get("webhook_secret"),
    )


_KEYS = [f.name for f in fields(Settings) if f.name != "home"]


def _paths(text: str) -> tuple[Path, ...]:
    """As in ``PATH``: several stand between colons (semicolons on Windows)."""
    return tuple(Path(part).expanduser().absolute() for part in text.split(os.pathsep) if part.strip())


def _read_file(path: Path) -> dict[str, str]:
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read", why=error.strerror or str(error)) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML", why=str(error)) from error
    values = table.get("adapterhub", {})
    for key, value in values.items() if isinstance(values, dict) else []:
        if key not in _KEYS or not isinstance(value, str):
            raise ConfigError(
                f"{path}: [adapterhub] {key} is not a setting" if key not in _KEYS else f"{path}: {key} must be text",
                why=f"settings are {', '.join(_KEYS)}",
            )
    return dict(values)


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user id, as in a container
        return "unknown"
