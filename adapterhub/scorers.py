"""What an answer is worth beside the one that was hoped for: each scorer is a function of two texts, from 0 to 1.

exact_match      the same text, apart from white space around it
contains         the answer holds the text that was hoped for
json             JSON, whole
tool_name        calls the same functions
tool_call        calls the same functions with the same arguments
regex:PATTERN    the pattern is found in the answer
FILE.py:NAME     a function of your own, called as NAME(answer, reference)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adapterhub.errors import RunFailed, UsageError

Scorer = Callable[[str, str], float]
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def scorer(written: str) -> tuple[str, Scorer]:
    """A scorer by name, with the name of its metric.

    Raises UsageError for one that there is not, a pattern that is none, or a file without that function.
    """
    if written in _BY_NAME:
        return written, _BY_NAME[written]
    if written.startswith("regex:"):
        return "regex", _matching(written.removeprefix("regex:"))
    file, colon, name = written.rpartition(":")
    if colon and file.endswith(".py"):
        return name, _from_file(Path(file), name)
    raise UsageError(
        f"there is no scorer {written!a}",
        why="there are " + ", ".join(_BY_NAME) + ", regex:PATTERN and FILE.py:NAME",
        hint="--score exact_match",
    )


def tool_calls(text: str) -> list[tuple[str, Any]] | None:
    """Name and arguments of every call in a text; None where it holds none that can be read.

    Calls stand between ``<tool_call>`` tags, or are the whole text: one object with ``name``, or a list of them.
    """
    parts = _CALL.findall(text) or [text.strip()]
    calls: list[tuple[str, Any]] = []
    for part in parts:
        try:
            found = json.loads(part)
        except ValueError:
            return None
        for call in found if isinstance(found, list) else [found]:
            call = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                return None
            calls.append((call["name"], call.get("arguments", call.get("parameters", {}))))
    return calls or None


def _exact_match(answer: str, reference: str) -> float:
    return float(answer.strip() == reference.strip())


def _contains(answer: str, reference: str) -> float:
    return float(reference.strip() in answer)


def _json(answer: str, reference: str) -> float:
    try:
        json.loads(answer)
    except ValueError:
        return 0.0
    return 1.0


def _tool_name(answer: str, reference: str) -> float:
    found, wanted = tool_calls(answer), tool_calls(reference)
    if found is None or wanted is None:
        return float(found is wanted)
    return float([name for name, _ in found] == [name for name, _ in wanted])


def _tool_call(answer: str, reference: str) -> float:
    return float(tool_calls(answer) == tool_calls(reference))


_BY_NAME: Mapping[str, Scorer] = {
    "exact_match": _exact_match,
    "contains": _contains,
    "json": _json,
    "tool_name": _tool_name,
    "tool_call": _tool_call,
}


def _matching(pattern: str) -> Scorer:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"regex:{pattern} is no regular expression", why=str(error)) from error
    return lambda answer, reference: float(compiled.search(answer) is not None)


def _from_file(file: Path, name: str) -> Scorer:
    import importlib.util

    spec = importlib.util.spec_from_file_location("scorer", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise UsageError(f"the scorer's file {file} was not found", hint="--score FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code: anything may come
        raise UsageError(f"the scorer's file {file} cannot be run", why=repr(error)) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{file} has no function {name}", hint=f"define {name}(answer, reference)")

    def score(answer: str, reference: str) -> float:
        try:
            return float(function(answer, reference))
        except Exception as error:  # the user's own code
            raise RunFailed(f"the scorer {name} of {file} failed", why=repr(error)) from error

    return score
