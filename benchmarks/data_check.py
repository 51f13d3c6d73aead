"""A JSONL of a million chat rows with one bad row at its end: how long until it is named, beside bare JSON parsing.

    ours   `read_source`: strict JSON, the format, every message and role, duplicates, sha256; the bad row named
    peer   json.loads of every line, and nothing else

Each side is a process of its own, so that its peak memory (maxrss, MB) is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine

SECONDS, MEGABYTES = 60, 1500
TEXT = "the harbour opens at dawn and every boat that leaves is written down with its crew and its cargo"
WORDS = TEXT.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measured(arguments.side, arguments.file, arguments.rows)))
        return
    with tempfile.TemporaryDirectory(prefix="ah-bench-") as folder:
        file = Path(folder) / "train.jsonl"
        write(file, arguments.rows)
        found = {side: run(side, file, arguments.rows) for side in ("peer", "ours")}
        size = file.stat().st_size
    ours, peer = found["ours"], found["peer"]
    row = {
        "name": f"data_check_{arguments.rows}_rows",
        "ours": round(ours["seconds"], 2),
        "peer": round(peer["seconds"], 2),
        "ratio": round(ours["seconds"] / peer["seconds"], 2),
        "unit": "s",
        "peak_mb": round(ours["peak_mb"]),
        "peer_peak_mb": round(peer["peak_mb"]),
        "file_mb": round(size / 1e6),
        "machine": machine(),
        "bar": f"{SECONDS} s, {MEGABYTES} MB",
        "met": ours["seconds"] <= SECONDS and ours["peak_mb"] <= MEGABYTES,
    }
    print(json.dumps({"rows": [row]}))


def write(path: Path, rows: int) -> None:
    """Two to eight messages a row, each of a few dozen words: about 0.9 kB."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows - 1):
            messages = [
                {"role": ("user", "assistant")[turn % 2], "content": " ".join(rotated(number * 7 + turn))}
                for turn in range(2 + number % 4 * 2)
            ]
            file.write(json.dumps({"messages": messages, "id": number}) + "\n")
        file.write('{"messages": [{"role": "user", "content": "and nobody answers"}]}\n')


def rotated(start: int) -> list[str]:
    return [WORDS[(start + i) % len(WORDS)] for i in range(12 + start % 24)]


def run(side: str, file: Path, rows: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--file", str(file), "--rows", str(rows)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(side: str, file: Path, rows: int) -> dict[str, float]:
    from adapterhub.errors import DataError
    from adapterhub.trainers import DataSource
    from adapterhub.trainers.data import read_source

    start = time.perf_counter()
    if side == "peer":
        with file.open("rb") as lines:
            for line in lines:
                json.loads(line)
    else:
        try:
            read_source(DataSource(path=str(file)))
        except DataError as error:
            assert error.what.startswith(f"{file}:{rows}: "), error
        else:
            raise AssertionError("the bad row was not found")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}


if __name__ == "__main__":
    main()
