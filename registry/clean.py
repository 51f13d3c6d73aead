"""Takes out of an adapter's config what is nobody else's business: secrets, and paths of the machine it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

BASE = "base_model_name_or_path"

_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|(api|access|private)_?key)$", re.IGNORECASE)
_SECRET = re.compile(
    r"hf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|sk-[A-Za-z0-9_-]{20,}"  # OpenAI and others
    r"|(AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}"  # GitHub
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|://[^/\s:@]+:[^/\s@]+@"  # user:password@ in a URL
)


def clean(config: Mapping[str, Any]) -> bytes:
    """The config as it is published, as JSON.

    The base keeps the last part of its path, for people; any other absolute path and any secret becomes null. A key
    stays even then, so that readers which expect it find it.
    """
    cleaned = {key: _cleaned(key, value) for key, value in config.items()}
    return (json.dumps(cleaned, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _cleaned(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _cleaned(k, v) for k, v in value.items()}
    if isinstance(value, list):
        return [_cleaned(key, v) for v in value]
    if not isinstance(value, str):
        return value
    if _SECRET_KEY.search(key) or _SECRET.search(value):
        return None
    if is_local(value):
        return _last_part(value) if key == BASE else None
    return value


def is_local(text: str) -> bool:
    """Whether ``text`` is a path that means something on one machine only."""
    return text.startswith(("/", "~", "./", "../", "file:")) or bool(re.match(r"[A-Za-z]:[\\/]|\\\\", text))


def _last_part(path: str) -> str | None:
    windows = re.match(r"[A-Za-z]:[\\/]|\\\\", path)
    return (PureWindowsPath(path).name if windows else PurePosixPath(path).name) or None
