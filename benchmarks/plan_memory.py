"""`ah plan`'s memory against published peaks, row by row: is it within 15 % on four rows of five?

The rows, their settings and their sources are in ``plan_memory.json``; the shapes are those of the tests' configs.
Nothing is measured here: the other side was measured by those who published it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapterhub.trainers.planning.memory import GB, Setup, memory
from adapterhub.trainers.planning.shapes import model_shape

HERE = Path(__file__).resolve().parent
BASES = HERE.parent / "tests" / "trainers" / "bases"
WITHIN, SHARE = 0.15, 0.8


def main() -> None:
    data = json.loads((HERE / "plan_memory.json").read_text())
    rows = [compared(row, data["sources"]) for row in data["rows"]]
    print(f"{'source':<15}{'base':<14}{'method':<15}{'tokens':>7}{'published':>11}{'planned':>9}{'error':>8}")
    for row in rows:
        mark = "" if abs(row["error"]) <= WITHIN else "  ✗"
        print(
            f"{row['source']:<15}{row['base']:<14}{row['method']:<15}{row['tokens']:>7}{row['published']:>11.1f}"
            f"{row['planned']:>9.1f}{row['error']:>+8.1%}{mark}"
        )
    for left in data["left_out"]:
        print(f"left out: {left}")
    inside = sum(abs(row["error"]) <= WITHIN for row in rows)
    share = inside / len(rows)
    print(
        json.dumps(
            {
                "name": f"plan: rows within {WITHIN:.0%} of the published peak, {inside} of {len(rows)}",
                "ours": round(share, 3),
                "peer": 1.0,
                "ratio": round(share, 3),
                "unit": "share of rows",
                "bar": f">= {SHARE}",
                "met": share >= SHARE,
                "rows_in_detail": rows,
            }
        )
    )


def compared(row: dict[str, Any], sources: dict[str, Any]) -> dict[str, Any]:
    """One row with what the plan says; GB are 10⁹ bytes, on all devices together."""
    settings = {**sources[row["source"]]["settings"], **row["settings"]}
    setup = Setup(**settings)
    shape = model_shape(json.loads((BASES / f"{row['base']}.json").read_text()))
    planned = memory(shape, setup).total * setup.shards / GB
    told = {key: row[key] for key in ("source", "base", "method", "published")}
    return told | {
        "tokens": setup.micro_batch * setup.tokens,
        "planned": round(planned, 2),
        "error": round(planned / row["published"] - 1, 4),
    }


if __name__ == "__main__":
    main()
