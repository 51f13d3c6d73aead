"""Many processes publish to one adapter at once: is every version there, whole, and numbered once?

    calm      all writers start together; nobody is disturbed
    storm     writers are killed (SIGKILL) at random and started again for the rest of their share; on S3 also 5 % of
              the replies to creates are lost after the server has done what was asked

On S3 over HTTP (moto's server, whose check and write of a conditional create are made one step by a lock), and in a
local folder. A writer writes down each version that it was told of, and how many numbers it tried for it. At the end:
numbers are 1..n without a gap, every file of every version is hashed, and what a writer was told of is what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import machine

from adapterhub.manifest import FileEntry, LoraShape, Manifest, Verdict, Verdicts
from adapterhub.refs import AdapterName
from adapterhub.registry import Draft, ObjectRegistry, open_store

NAME = AdapterName("acme", "support")
TRIES_BAR = 3
AWS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench-secret", "AWS_DEFAULT_REGION": "us-east-1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--writers", type=int, default=32)
    parser.add_argument("--publishes", type=int, default=20, help="of each writer")
    parser.add_argument("--lose", type=float, default=0.05, help="share of the replies lost in the storm on S3")
    parser.add_argument("--serve", type=float, metavar="LOSE", help="only run the server")
    parser.add_argument("--write", nargs=3, metavar=("URL", "COUNT", "FILE"), help="only be one writer")
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
    elif arguments.write:
        url, count, file = arguments.write
        write(url, int(count), Path(file))
    else:
        os.environ.update(AWS)
        rows = []
        for storm in (False, True):
            with tempfile.TemporaryDirectory(prefix="ah-bench-") as folder:
                with served(arguments.lose if storm else 0.0) as endpoint:
                    url = f"s3://models/team?endpoint={endpoint}"
                    rows += measure("s3", url, Path(folder) / "s3", arguments, storm=storm)
                rows += measure("local", f"{folder}/registry", Path(folder) / "local", arguments, storm=storm)
        print(json.dumps({"rows": rows}))


def measure(kind: str, url: str, folder: Path, arguments: Any, *, storm: bool) -> list[dict[str, Any]]:
    folder.mkdir()
    start = time.perf_counter()
    run(url, folder, arguments.writers, arguments.publishes, storm=storm)
    seconds = time.perf_counter() - start
    told = [json.loads(line) for file in folder.glob("*.told") for line in file.read_text().splitlines()]
    faults, there = check(url, told)
    wanted = arguments.writers * arguments.publishes
    name = f"writers_{kind}{'_storm' if storm else ''}"
    common = {"machine": machine()}
    # killed between the commit and its note, a writer publishes one more
    right = not faults and (there >= wanted if storm else there == wanted)
    tries = statistics.median(one["tries"] for one in told)
    said = f"{name}: {there} versions in {seconds:.0f} s, {len(told)} told, median tries {tries}"
    print(said, *faults, sep="\n  ", flush=True)
    return [
        {"name": name, "ours": there, "peer": wanted, "ratio": there / wanted, "unit": "versions", "bar": wanted}
        | common
        | {"met": right},
        {"name": f"{name}_tries", "ours": tries, "peer": TRIES_BAR, "ratio": tries / TRIES_BAR, "unit": "tries"}
        | common
        | {"bar": TRIES_BAR, "met": tries <= TRIES_BAR},
    ]


def check(url: str, told: list[dict[str, Any]]) -> tuple[list[str], int]:
    """What is wrong, and how many versions there are."""
    registry = ObjectRegistry(open_store(url))
    versions = {version.record.version: version.record for version in registry.versions(NAME)}
    faults = []
    if sorted(versions) != list(range(1, len(versions) + 1)):
        faults.append("the numbers have gaps")
    if len({one["version"] for one in told}) != len(told):
        faults.append("two writers were told one number")
    for one in told:
        record = versions.get(one["version"])
        if record is None or record.digest != one["digest"]:
            faults.append(f"{one} is not there")
    if len({record.publish_id for record in versions.values()}) != len(versions):
        faults.append("a publish has two versions")
    for record in versions.values():
        for file in record.manifest.files:
            registry.check_file(record, file.path)
    return faults, len(versions)


def run(url: str, folder: Path, writers: int, publishes: int, *, storm: bool) -> None:
    """All writers at once, until each was told of its share."""
    files = [folder / f"{number}.told" for number in range(writers)]
    for file in files:
        file.touch()
    chance = random.Random(1)
    kills = writers if storm else 0
    running: dict[Path, subprocess.Popen[bytes]] = {}
    while True:
        for file in files:
            left = publishes - len(file.read_text().splitlines())
            ended = file not in running or running[file].poll() is not None
            if ended and file in running and running[file].returncode not in (0, -signal.SIGKILL):
                sys.exit(f"error: a writer failed with {running[file].returncode}")
            if ended and left > 0:
                command = [sys.executable, __file__, "--write", url, str(left), str(file)]
                running[file] = subprocess.Popen(command)
        alive = [process for process in running.values() if process.poll() is None]
        if not alive and all(len(file.read_text().splitlines()) >= publishes for file in files):
            return
        time.sleep(chance.uniform(0.05, 0.5))
        # none before all have begun: what is measured is writing, not starting
        if kills and alive and all(file.stat().st_size for file in files):
            chance.choice(alive).kill()
            kills -= 1


def write(url: str, count: int, told: Path) -> None:
    pauses: list[float] = []

    def wait(seconds: float) -> None:
        pauses.append(seconds)
        time.sleep(seconds)

    registry = ObjectRegistry(open_store(url), wait=wait)
    with tempfile.TemporaryDirectory() as folder, told.open("a") as notes:
        for number in range(count):
            pauses.clear()
            record = registry.publish(new_draft(Path(folder) / str(number)), name=NAME, author=str(os.getpid()))
            note = {"version": record.version, "digest": record.digest, "tries": len(pauses) + 1}
            notes.write(json.dumps(note) + "\n")
            notes.flush()


def new_draft(folder: Path) -> Draft:
    """8 KB that nobody else has."""
    folder.mkdir()
    contents = {"adapter_config.json": b"{}", "adapter_model.safetensors": os.urandom(8192)}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = tuple(FileEntry(name, len(c), hashlib.sha256(c).hexdigest()) for name, c in contents.items())
    shape = LoraShape(rank=4, alpha=8, target_modules=("q_proj",), parameters=1, dtype="F32")
    yes = Verdict("yes")
    return Draft(folder, Manifest(files=files, lora=shape), Verdicts(yes, yes, yes))


# ── the server ───────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def served(lose: float) -> Iterator[str]:
    command = [sys.executable, __file__, "--serve", str(lose)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        endpoint = server.stdout.readline().strip()
        import boto3

        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="models")
        yield endpoint
        server.kill()


def serve(lose: float) -> None:
    import logging
    import socket

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto, lock, chance = DomainDispatcherApplication(create_backend_app), threading.Lock(), random.Random(0)

    def application(environ: Any, start: Any) -> Any:
        with lock:
            body = list(moto(environ, start))
            lost = environ["REQUEST_METHOD"] == "PUT" and chance.random() < lose
        if lost and environ.get("HTTP_IF_NONE_MATCH"):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return body

    server = make_server("127.0.0.1", 0, application, threaded=True)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
