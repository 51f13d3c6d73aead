"""Prompts by which a candidate is scored before and while it has callers: one file an adapter, in a folder.

    PROMPTS/acme/support.jsonl
    {"prompt": "What is the capital of France?", "expected": "Paris", "score": "contains"}
    {"messages": [{"role": "user", "content": "…"}], "score": "regex:^(yes|no)$", "max_tokens": 4}
    {"prompt": "Where is order 7?", "expected": "…", "score": "mine.py:near"}

``score`` is a scorer of `adapterhub.scorers`, ``contains`` where it is not said; a file of Python is looked for beside
the prompts. The score of a version is the mean over its prompts, from 0 to 1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import DataError, UsageError
from adapterhub.refs import AdapterName
from adapterhub.scorers import Scorer, scorer

MOST = 1000  # prompts of one adapter
_TOKENS = 64  # of an answer whose prompt does not say
_KEYS = {"prompt", "messages", "expected", "score", "max_tokens"}


@dataclass(frozen=True)
class Prompt:
    """One question, and how its answer is scored."""

    messages: tuple[dict[str, Any], ...]
    expected: str
    scorer: Scorer
    max_tokens: int = _TOKENS


def read_prompts(folder: Path, name: AdapterName) -> tuple[Prompt, ...]:
    """An adapter's prompts; none where there is no file for it. Blocking. Raises DataError, UsageError."""
    path = folder / name.tenant / f"{name.adapter}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read", why=str(error)) from error
    prompts = tuple(_prompt(line, f"{path}:{number}", folder) for number, line in enumerate(lines, 1) if line.strip())
    if len(prompts) > MOST:
        raise DataError(f"{path} has {len(prompts)} prompts", why=f"at most {MOST} are asked")
    return prompts


def check_folder(folder: Path) -> int:
    """Read every file of a folder, and return how many there are. Raises DataError, UsageError."""
    if not folder.is_dir():
        raise UsageError(f"--prompts {folder} is no folder", why="it holds TENANT/ADAPTER.jsonl")
    files = sorted(folder.glob("*/*.jsonl"))
    for file in files:
        read_prompts(folder, AdapterName.parse(f"{file.parent.name}/{file.stem}"))
    return len(files)


def _prompt(line: str, where: str, folder: Path) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON", why=str(error)) from error
    if not isinstance(row, dict) or row.keys() - _KEYS:
        raise DataError(f"{where} is no prompt", why=f"an object with {', '.join(sorted(_KEYS))}")
    messages = row.get("messages") or [{"role": "user", "content": row.get("prompt")}]
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages
    )
    tokens = row.get("max_tokens", _TOKENS)
    if not good or not isinstance(row.get("expected", ""), str) or type(tokens) is not int or tokens < 1:
        raise DataError(f"{where} is no prompt", why="`prompt` or `messages` are text, `max_tokens` is a number")
    written = str(row.get("score", "contains"))
    if not written.startswith("regex:") and ".py:" in written:
        written = str(folder / written)
    try:
        _, score = scorer(written)
    except UsageError as error:
        raise DataError(f"{where}: {error.what}", why=error.why) from error
    if "expected" not in row and score is _CONTAINS:
        raise DataError(f"{where} says nothing of the answer", why="it needs `expected`, or `score` like regex:PATTERN")
    return Prompt(tuple(messages), row.get("expected", ""), score, tokens)


_CONTAINS = scorer("contains")[1]
