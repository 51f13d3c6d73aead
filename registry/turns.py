"""When to try again for a number that somebody else took. No I/O.

Of those who read one newest number, the first to create the next wins, and the others read again. A try fails where
another commit falls between its reading and its creating: with λ commits a second and w seconds between the two, it
succeeds with probability exp(-λw). A crowd that comes back at once makes λw about log(crowd): most tries are in vain.
One that spreads over the time of ``crowd`` tries makes λw about 0.7: every second try wins, whatever the crowd and
however slow the store. And nobody waits in a line that a killed writer could block.
"""

from __future__ import annotations

import random

LONGEST = 30.0  # seconds, before jitter: whatever the crowd


def pause(*, crowd: int, took: float) -> float:
    """Seconds to wait, with full jitter, after a try that ``took`` so many seconds and was lost.

    ``crowd``: publishers who are about to commit under one tenant, the caller among them.
    """
    return random.uniform(0, min(LONGEST, max(1, crowd) * took))  # noqa: S311 - jitter, no secret
