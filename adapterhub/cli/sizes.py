"""Sizes as people type them."""

from __future__ import annotations

import re

from adapterhub.errors import UsageError


def parse_size(text: str, *, flag: str) -> int:
    """``5GB`` → bytes; decimal units, as transformers counts them. Raises UsageError, which names ``flag``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise UsageError(f"{text!a} is not a size", hint=f"write {flag} 5GB")
    return size
