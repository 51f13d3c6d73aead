"""`ah fsck` of 1,000 local versions, beside hashlib over the same bytes.

    ours   every record, log, channel and digest read and checked, every blob hashed
    peer   hashlib's file_digest of every file of every version, one after another, and nothing else

Both read from the page cache; the sides take turns. Each version has weights of its own and the config of all. What a
version costs beside its bytes is about 0.4 ms, so with files of 1 MB (--size 1000000) the ratio is nearer to the bar.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from machine import machine

from adapterhub.manifest import FileEntry, LoraShape, Manifest, Verdict, Verdicts
from adapterhub.refs import AdapterName
from adapterhub.registry import Draft, Registry, open_registry
from adapterhub.registry.fsck import fsck

BAR = 1.3  # times the peer
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--size", type=int, default=4_000_000, help="bytes of the weights of one version")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ah-bench-") as folder:
        registry = open_registry(str(Path(folder) / "registry"))
        for number in range(arguments.versions):
            name = AdapterName("bench", f"adapter-{number % arguments.adapters}")
            publish(registry, Path(folder) / "draft", name, arguments.size)
        files = [p for p in (Path(folder) / "registry" / "t" / "bench" / "blobs").rglob("*") if p.is_file()]
        for file in files:
            hash_file(file)  # warms up
        times: dict[str, list[float]] = {"ours": [], "peer": []}
        for number in range(arguments.rounds):
            for side in ("ours", "peer") if number % 2 else ("peer", "ours"):
                start = time.perf_counter()
                if side == "ours":
                    report = fsck(registry)
                    assert report.is_clean and report.versions == arguments.versions, report
                else:
                    for file in files:
                        hash_file(file)
                times[side].append(time.perf_counter() - start)
    medians = {side: statistics.median(values) for side, values in times.items()}
    row = {
        "name": f"fsck_{arguments.versions}_versions",
        "ours": round(medians["ours"], 3),
        "peer": round(medians["peer"], 3),
        "ratio": round(medians["ours"] / medians["peer"], 2),
        "unit": "s",
        "gigabytes": round(arguments.versions * arguments.size / 1e9, 2),
        "machine": machine(),
        "bar": BAR,
        "met": medians["ours"] <= BAR * medians["peer"],
    }
    print(json.dumps({"rows": [row]}))


def publish(registry: Registry, folder: Path, name: AdapterName, size: int) -> None:
    folder.mkdir(exist_ok=True)
    contents = {CONFIG: b"{}", WEIGHTS: os.urandom(size)}
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    files = tuple(FileEntry(f, len(c), hashlib.sha256(c).hexdigest()) for f, c in contents.items())
    shape = LoraShape(rank=16, alpha=32, target_modules=("q_proj", "v_proj"), parameters=size // 2, dtype="BF16")
    yes = Verdict("yes")
    registry.publish(Draft(folder, Manifest(files=files, lora=shape), Verdicts(yes, yes, yes)), name=name, author="b")


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
