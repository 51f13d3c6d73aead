"""Runs every benchmark and writes one table: ``.bench/results.md`` and ``.bench/results.json``.

Each script measures both sides in one run and prints one JSON line last: ``{"name", "ours", "peer", "ratio", "unit",
"machine"}``, or ``{"rows": [...]}`` of such. Scripts run one after another: two at once would measure each other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / ".bench"
NOT_BENCHMARKS = {
    "run_all.py",
    "machine.py",
    "engines.py",
    "clients.py",
    "soak.py",
    "models.py",
    "lora_configurations.py",
    "trainings.py",
    "plain_trl.py",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the benchmarks and write a table.")
    parser.add_argument("names", nargs="*", help="only these, e.g. startup export_merge")
    parser.add_argument("--gpu", action="store_true", help="the benchmarks that need a GPU (gpu_*.py)")
    arguments = parser.parse_args()

    rows: list[dict[str, Any]] = []
    failed = []
    for script in scripts(arguments.names, gpu=arguments.gpu):
        print(f"── {script.stem}", flush=True)
        done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            failed.append(script.stem)
        else:
            rows += read_rows(done.stdout)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "results.md").write_text(table(rows))
    print(table(rows))
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed")


def scripts(names: list[str], *, gpu: bool) -> list[Path]:
    found = [p for p in sorted(HERE.glob("*.py")) if p.name not in NOT_BENCHMARKS]
    if unknown := set(names) - {p.stem for p in found}:
        sys.exit(f"error: no benchmark {', '.join(sorted(unknown))}; there are {', '.join(p.stem for p in found)}")
    return [p for p in found if (p.stem in names if names else p.stem.startswith("gpu_") == gpu)]


def read_rows(printed: str) -> list[dict[str, Any]]:
    last = json.loads(printed.strip().splitlines()[-1])
    rows: list[dict[str, Any]] = last.get("rows", [last])
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| what | ours | peer | ratio | unit | bar | met |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row.get(k) for k in ("name", "ours", "peer", "ratio", "unit", "bar", "met")]
        lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
    machines = sorted({row["machine"] for row in rows if row.get("machine")})
    return "\n".join(lines) + "\n\n" + "\n".join(f"Measured on {m}." for m in machines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
