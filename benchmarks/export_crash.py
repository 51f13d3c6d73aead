"""An export killed (SIGKILL) at random moments and resumed, again and again: the same bytes, and never half a model.

A 2.2 GB model in one file, so that resuming happens inside it. Each attempt is killed at a moment between the start of
the merge and its end; the next one has `--resume`. When one finishes, its files are compared with those of an
undisturbed export, and it starts over.

    python benchmarks/export_crash.py [--kills 50]
    python benchmarks/export_crash.py --kills 5 --small     # 0.4 GB: whether everything runs
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine
from models import LLAMA_1B, SMALL, write_adapter, write_base

from adapterhub.base import find_base
from adapterhub.export import export_model, verify

BENCH = Path(__file__).resolve().parents[1] / ".bench" / "export_crash"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--small", action="store_true", help="a smaller model")
    arguments = parser.parse_args()
    shape = SMALL if arguments.small else LLAMA_1B
    shutil.rmtree(BENCH, ignore_errors=True)  # of a run that broke off
    write_base(BENCH / "base", shape, shards=1)
    write_adapter(BENCH / "adapter", shape)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "adapterhub.export.model", "adapterhub.export.arithmetic"])
    attempt(processes, "warm").join()
    began = time.monotonic()
    attempt(processes, "straight").join()
    whole = time.monotonic() - began
    wanted = hashes(BENCH / "straight")
    assert wanted == hashes(BENCH / "warm")
    found = kill_many(processes, arguments.kills, whole, wanted)
    shutil.rmtree(BENCH)
    name = f"export: {found['killed']} SIGKILLs with --resume: models other than the undisturbed one, or half made"
    numbers = {"ours": found["wrong"], "peer": 0, "ratio": None, "unit": "models", "machine": machine()}
    print(found, f"one export {whole:.1f} s", file=sys.stderr)
    print(json.dumps({"name": name, **numbers, "bar": "0", "met": found["wrong"] == 0}))


def kill_many(processes: Any, kills: int, whole: float, wanted: dict[str, str]) -> dict[str, int]:
    chance = random.Random(6)
    to = BENCH / "out"
    found = {"killed": 0, "whole": 0, "wrong": 0, "resumed": 0}
    while found["killed"] < kills or not found["whole"]:
        enough = found["killed"] >= kills
        journal = BENCH / ".out.exporting" / ".journal"
        found["resumed"] += journal.is_file() and len(journal.read_text().splitlines()) > 1
        child = attempt(processes, "out")
        child.join(None if enough else chance.uniform(0, 0.9 * whole))
        child.kill()
        child.join()
        found["killed"] += child.exitcode == -9
        if to.exists():  # it has its name: then it must be whole, whenever the kill came
            verify(to)
            found["whole"] += 1
            found["wrong"] += hashes(to) != wanted
            shutil.rmtree(to)
    return found


def attempt(processes: Any, name: str) -> Any:
    base = find_base(str(BENCH / "base"))
    child = processes.Process(
        target=export_model, args=(BENCH / "adapter", base, BENCH / name), kwargs={"resume": True}
    )
    child.start()
    return child


def hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


if __name__ == "__main__":
    main()
