"""What of the engine's log a person should see, and why an engine broke off. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MILESTONES = {"Starting to load model": "loading the base model", "Starting vLLM server": "starting the HTTP server"}
_LINE = re.compile(r"\((?P<process>\w+)[^)]*\) (?P<level>[A-Z]+) \S+ \S+ \[[^]]*\] (?P<message>.*)")
_OWN = re.compile(r"[A-Z]+ \S+ \S+ adapterhub[.\w]*: (?P<message>.*)")
_DETAIL = (" ", "Traceback ", "Dumping ")  # how the lines of a stack trace or a dump begin
_EXCEPTION = re.compile(r"(?:^|\] )(?P<cause>[\w.]*(?:Error|Exception): \S.*)")


def telling(line: str) -> str | None:
    """What a person should see of a line of the engine's log: our own lines, milestones and errors. Else None."""
    if own := _OWN.match(line):
        return own["message"]
    found = _LINE.match(line)
    if not found:
        return None
    message = found["message"]
    if found["level"] in ("ERROR", "CRITICAL"):
        return f"{found['process']}: {message[:200]}" if message and not message.startswith(_DETAIL) else None
    return next((told for start, told in _MILESTONES.items() if message.startswith(start)), None)


def cause(lines: Sequence[str]) -> str:
    """Why the engine broke off: the first exception near the end of its log (the rest follows), or its last lines."""
    first = next((found["cause"] for line in lines[-300:] if (found := _EXCEPTION.search(line))), None)
    return first or "\n".join(["its last lines:", *lines[-12:]])
