"""How long an export takes: bytes over the speed of the last export on this machine, or of an assumption that is told.

What a disk and its page cache do cannot be told from headers, and a plan writes nothing to find out.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from adapterhub.export.plan import Plan

_SMALLEST = 10**8  # bytes; a smaller export measures its start


@dataclass(frozen=True)
class Speed:
    """Of weights, in bytes written a second: until the model is durable, and for the certificate after it."""

    merge: float
    certificate: float
    measured: bool = True

    def told(self) -> str:
        """Where the figures come from, for people."""
        origin = "as the last export here" if self.measured else "assumed: a local SSD and two cores"
        return f"{self.merge / 1e9:.2f} GB/s written, {self.certificate / 1e9:.2f} GB/s checked, {origin}"


ASSUMED = Speed(merge=0.5e9, certificate=0.4e9, measured=False)


def seconds(plan: Plan, speed: Speed, *, certificate: bool = True) -> float:
    """How long the export will take. A base that is not in the page cache takes what its disk takes to read it."""
    return plan.bytes_written / speed.merge + (plan.bytes_written / speed.certificate if certificate else 0.0)


def last_speed(file: Path) -> Speed:
    """What `remember` wrote, else the assumption."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        speed = Speed(float(found["merge"]), float(found["certificate"]))
    except (OSError, ValueError, KeyError, TypeError):  # a note from an older release, or none yet
        return ASSUMED
    return speed if speed.merge > 0 and speed.certificate > 0 else ASSUMED


def remember(file: Path, *, size: int, merge: float, certificate: float) -> None:
    """Keep the speed of a whole export of ``size`` bytes. ``merge``, ``certificate``: seconds, 0 if there was none."""
    if size < _SMALLEST or merge <= 0:
        return
    before = last_speed(file)
    speed = Speed(size / merge, size / certificate if certificate > 0 else before.certificate)
    with suppress(OSError):  # a home that cannot be written takes nothing from the export
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(speed)) + "\n", encoding="utf-8")
