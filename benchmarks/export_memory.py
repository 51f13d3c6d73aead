"""Peak memory and speed of an export, whatever the model: 2.2 GB and 13 GB in shards, 6 GB in one file.

Each in a process of its own, all-linear adapter of rank 16, without the certificate, which export_merge.py has in its
figure. Memory is the peak above the interpreter with torch imported; speed is weights written until they are durable.
Needs 32 GB of disk, which are given back.

    python benchmarks/export_memory.py
    python benchmarks/export_memory.py --small      # 0.4 GB in place of each: whether everything runs
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import machine
from models import LLAMA_1B, LLAMA_3B, LLAMA_7B, SMALL, Shape, peak_memory, write_adapter, write_base

BENCH = Path(__file__).resolve().parents[1] / ".bench" / "export_memory"
MODELS: dict[str, tuple[Shape, int]] = {"2.2": (LLAMA_1B, 5), "13": (LLAMA_7B, 5), "6": (LLAMA_3B, 1)}  # GB, shards
NEEDED = 32e9  # bytes of disk
if "--small" in sys.argv:
    MODELS, NEEDED = {name: (SMALL, shards) for name, (_, shards) in MODELS.items()}, 2e9
ROUNDS = 3

Run = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help="its figures say little")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(export(arguments.side)))
        return
    BENCH.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(BENCH).free < NEEDED:
        sys.exit(f"error: this needs {NEEDED / 1e9:.0f} GB of disk in {BENCH}")
    runs = {name: measure(name) for name in MODELS}
    shutil.rmtree(BENCH)
    print(json.dumps({"rows": rows(runs)}, ensure_ascii=False))


def measure(name: str) -> dict[str, float]:
    shape, shards = MODELS[name]
    write_base(BENCH / name / "base", shape, shards=shards)
    adapter = write_adapter(BENCH / name / "adapter", shape)
    found = [in_own_process(name) for _ in range(ROUNDS)]
    adapter_mb = (adapter / "adapter_model.safetensors").stat().st_size / 1e6
    shutil.rmtree(BENCH / name)
    print(name, adapter_mb, found, file=sys.stderr)
    return {
        "memory": max(run["memory_mb"] for run in found),
        "speed": statistics.median(run["speed"] for run in found),
        "adapter": adapter_mb,
    }


def in_own_process(name: str) -> Run:
    os.sync()
    small = [flag for flag in sys.argv[1:] if flag == "--small"]
    done = subprocess.run([sys.executable, __file__, "--side", name, *small], check=True, stdout=subprocess.PIPE)
    shutil.rmtree(BENCH / name / "out")
    result: Run = json.loads(done.stdout.splitlines()[-1])
    return result


def export(name: str) -> Run:
    import torch  # noqa: F401  what is measured is above it

    from adapterhub.base import find_base
    from adapterhub.export import export_model

    folder = BENCH / name
    before = peak_memory(reset=True)
    result = export_model(folder / "adapter", find_base(str(folder / "base")), folder / "out", certificate=False)
    memory = (peak_memory() - before) / 1e6
    return {"memory_mb": memory, "speed": result.bytes_written / result.merge_seconds / 1e9}


def rows(runs: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    small, large, single = runs["2.2"], runs["13"], runs["6"]
    found = [
        row(
            f"export, {name} GB: peak memory above torch, 200 MB + adapter",
            run["memory"],
            200 + run["adapter"],
            "MB",
            bar="≤ 200 MB + adapter",
            met=run["memory"] <= 200 + run["adapter"],
        )
        for name, run in runs.items()
    ]
    grows = {name: run["memory"] > 1.2 * small["memory"] for name, run in runs.items()}
    return [
        *found,
        row(
            "export: peak memory, 13 GB and 2.2 GB",
            large["memory"],
            small["memory"],
            "MB",
            bar="no more, +20 %",
            met=not grows["13"],
        ),
        row(
            "export: peak memory, one file of 6 GB and 2.2 GB",
            single["memory"],
            small["memory"],
            "MB",
            bar="no more, +20 %",
            met=not grows["6"],
        ),
        row(
            "export: speed, one file of 6 GB and 2.2 GB",
            single["speed"],
            small["speed"],
            "GB/s",
            bar="no slower, -20 %",
            met=single["speed"] >= 0.8 * small["speed"],
        ),
        row("export: speed, 13 GB and 2.2 GB", large["speed"], small["speed"], "GB/s"),
    ]


def row(name: str, ours: float, peer: float, unit: str, **more: Any) -> dict[str, Any]:
    numbers = {"ours": round(ours, 3), "peer": round(peer, 3), "ratio": round(ours / peer, 3)}
    return {"name": name, **numbers, "unit": unit, "machine": machine(), **more}


if __name__ == "__main__":
    main()
