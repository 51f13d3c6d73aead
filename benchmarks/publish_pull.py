"""Publishing and pulling a 100 MB adapter, beside hashing it once and copying it once to disk.

    publish   read, judge (NaN, zero, shapes), hash, store with its hash checked on the way, commit
    pull      into a new folder, hash checked on the way
    peer      hashlib's sha256 of the file, then a copy with fsync

All of it on one local disk, files in the page cache, new bytes in every round (the registry sends no bytes twice).
The sides take turns; medians over the rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import machine
from safetensors.numpy import save_file

from adapterhub.refs import AdapterName
from adapterhub.registry import draft, fetch_folder, open_registry

BAR = 2.0  # times the peer
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYERS, WIDTH, RANK = 32, 4096, 48  # 100.7 MB in float16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {"publish": [], "pull": [], "peer": []}
    with tempfile.TemporaryDirectory(prefix="ah-bench-") as folder:
        for number in range(rounds + 1):
            once = measure(Path(folder), number)
            if number:  # the first warms up, and proves the store
                for name, seconds in once.items():
                    times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        {
            "name": f"{name}_100mb",
            "ours": round(medians[name], 3),
            "peer": round(medians["peer"], 3),
            "ratio": round(medians[name] / medians["peer"], 2),
            "unit": "s",
            "machine": machine(),
            "bar": BAR,
            "met": medians[name] <= BAR * medians["peer"],
        }
        for name in ("publish", "pull")
    ]
    print(json.dumps({"rows": rows}))


def measure(folder: Path, number: int) -> dict[str, float]:
    """Seconds of each side for one adapter that nobody has seen."""
    adapter = write_adapter(folder / "adapter", seed=number)
    registry = open_registry(str(folder / "registry"))
    name = AdapterName.parse("bench/adapter")
    sides: dict[str, Callable[[], object]] = {
        "peer": lambda: hash_and_copy(adapter / "adapter_model.safetensors", folder / "copy"),
        "publish": lambda: registry.publish(draft(adapter), name=name, author="bench"),
        "pull": lambda: fetch_folder(registry, registry.resolve(name.at("latest")).record, folder / "pulled"),
    }
    order = list(sides) if number % 2 else ["publish", "pull", "peer"]
    seconds = {side: timed(sides[side]) for side in order}
    shutil.rmtree(folder / "pulled")
    shutil.rmtree(adapter)
    (folder / "copy").unlink()
    return seconds


def timed(action: Callable[[], object]) -> float:
    os.sync()  # nobody pays for what another left unwritten
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def hash_and_copy(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    with source.open("rb") as file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())


def write_adapter(path: Path, *, seed: int) -> Path:
    path.mkdir()
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module in MODULES:
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((RANK, WIDTH), dtype=np.float32).astype(np.float16)
            tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal((WIDTH, RANK), dtype=np.float32).astype(np.float16)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(MODULES)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


if __name__ == "__main__":
    main()
