"""`benchmarks/middleware.py` measures what it says: a stub that answers, everything of ours on."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


async def test_it_measures(tmp_path: Path) -> None:
    import middleware  # from benchmarks/

    rows = await middleware.measure(tmp_path, 0.1, None)
    assert {row["name"].removeprefix("middleware alone: ") for row in rows} == {
        "requests a second", "streamed chunks a second", "time in our code, p50", "time in our code, p99",
    }  # fmt: skip
    assert all(row["ours"] > 0 for row in rows)


pytestmark = [pytest.mark.slow, pytest.mark.anyio]
