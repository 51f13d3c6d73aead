"""What of the engine's log a person should see, and why an engine broke off. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

_MILESTONES = {"Starting to load model": "loading the base model", "Starting vLLM server": "starting the HTTP server"}
_LINE = re.compile(r"\((?P<process>\w+)[^)]*\) (?P<level>[A-Z]+) \S+ \S+ \[[^]]*\] (?P<message>.*)")
_OWN = re.compile(r"[A-Z]+ \S+ \S+ adapterhub[.\w]*: (?P<message>.*)")
_DETAIL = (" ", "Traceback ", "Dumping ")  # how the lines of a stack trace or a dump begin
_EXCEPTION = re.compile(r"(?:^|\] )(?P<cause>[\w.]*(?:Error|Exception): \S.*)")


def telling(line: str) -> str | None:
    """What a person should see of a line of the engine's log: our own lines, milestones and errors. Else None.

    Of a log in JSON every entry, as it is: machines read it.
    """
    if line.startswith('{"time": '):
        return line
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
    plain = [part for line in lines[-300:] for part in _plain(line)]
    first = next((found["cause"] for line in plain if (found := _EXCEPTION.search(line))), None)
    return first or "\n".join(["its last lines:", *plain[-12:]])


def _plain(line: str) -> Iterator[str]:
    """An entry of a log in JSON as its message and its stack trace; any other line as it is."""
    if not line.startswith('{"time": '):
        yield line
        return
    try:
        entry = json.loads(line)
    except ValueError:  # cut off by the end of the engine
        yield line
        return
    yield from f"{entry['message']}\n{entry.get('exception', '')}".splitlines()
