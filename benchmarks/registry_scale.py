"""A large registry: one adapter with 100,000 versions, and a tenant with 10,000 adapters.

    resolve    `@prod`, with its status       S3: requests counted at the server; local: timed
    publish    the next version of the large adapter, likewise
    ls         the overview of 10,000 adapters, with a snapshot there
    search     the same, and a query over all versions

On S3 over HTTP (moto's server) and in a local folder, each beside the same question to a small registry (10 versions,
10 adapters): the size is what must not matter. The registries are made in memory, as publishers would have left them
days ago, and put where they are asked without HTTP: what is asked goes over it. moto's LIST looks at every key of the
bucket, so its seconds are more than a store's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import machine
from registry_writers import AWS, new_draft

from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry import ObjectRegistry, layout, open_store
from adapterhub.registry.base import ChannelMove, Target
from adapterhub.registry.entries import move_to_bytes
from adapterhub.registry.memory import MemoryStore
from adapterhub.registry.views.query import Query, search

NAME = AdapterName("acme", "support")
SMALL = 10
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=100_000)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--ask", nargs=2, metavar=("URL", "QUESTION"), help="only ask, and print the seconds")
    arguments = parser.parse_args()
    if arguments.ask:
        answer(*arguments.ask)
        return
    os.environ.update(AWS)
    with tempfile.TemporaryDirectory(prefix="ah-bench-") as name, served() as (endpoint, count):
        folder = Path(name)
        s3, local = {}, {}
        sizes = {"large": (arguments.versions, arguments.adapters), "small": (SMALL, SMALL)}
        for size, (versions, adapters) in sizes.items():
            keys = made(folder / f"{size}-draft", versions, adapters)
            to_moto(keys, bucket=size, endpoint=endpoint)
            to_folder(keys, folder / size)
            s3[size], local[size] = f"s3://{size}/team?endpoint={endpoint}", str(folder / size)
        rows = [
            *both("resolve", s3, local, count, bars={"s3_requests": 4, "local_ms": 50}),
            *both("publish", s3, local, count, bars={}),
            *both("ls", s3, local, count, bars={"s3_requests": 15, "s3_ms": 3000}),
            *both("search", s3, local, count, bars={}),
        ]
    print(json.dumps({"rows": rows}))


def both(
    name: str,
    s3: dict[str, str],
    local: dict[str, str],
    count: Callable[[], int],
    *,
    bars: dict[str, float],
) -> list[dict[str, Any]]:
    """One row for each thing that was measured, large beside small."""
    remote = {size: asked(url, name, count) for size, url in s3.items()}
    near = {size: asked(url, name, count) for size, url in local.items()}
    found = {
        "s3_requests": {size: float(requests) for size, (requests, _) in remote.items()},
        "s3_ms": {size: 1000 * seconds for size, (_, seconds) in remote.items()},
        "local_ms": {size: 1000 * seconds for size, (_, seconds) in near.items()},
    }
    return [row(f"{name}_{what}", its["large"], its["small"], bars.get(what)) for what, its in found.items()]


def row(name: str, large: float, small: float, bar: float | None) -> dict[str, Any]:
    unit = "ms" if name.endswith("_ms") else "requests"
    shown = {"name": name, "ours": round(large, 2), "peer": round(small, 2), "ratio": round(large / small, 2)}
    shown |= {"unit": unit, "machine": machine()}
    print(shown, flush=True)
    return shown if bar is None else shown | {"bar": bar, "met": large <= bar}


def asked(url: str, question: str, count: Callable[[], int]) -> tuple[int, float]:
    """Requests and seconds of one question, asked by a fresh process as `ah` is; medians of five."""
    requests, seconds = [], []
    for _ in range(ROUNDS):
        before = count()
        command = [sys.executable, __file__, "--ask", url, question]
        seconds.append(float(subprocess.check_output(command, text=True)))
        requests.append(count() - before)
    return int(statistics.median(requests)), statistics.median(seconds)


def answer(url: str, question: str) -> None:
    """In a process of its own: prints the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        draft = new_draft(Path(folder) / "draft")
        start = time.perf_counter()
        registry = ObjectRegistry(open_store(url))
        if question == "resolve":
            registry.resolve(AdapterRef(NAME, channel="prod"))
        elif question == "publish":
            registry.publish(draft, name=NAME, author="ana")
        elif question == "ls":
            assert registry.overview("many")
        else:
            assert search(registry.overview("many"), Query(words=("a7",)))
        print(time.perf_counter() - start)


# ── a registry that was there for long ───────────────────────────────────────────────────────────────────────


def made(draft: Path, versions: int, adapters: int) -> dict[str, bytes]:
    """Key → value: ``acme/support`` with so many versions, and so many adapters of ``many``, each with one in prod."""
    store = MemoryStore()
    first = ObjectRegistry(store).publish(new_draft(draft), name=NAME, author="ana")
    record = first.to_json()
    many = {layout.REGISTRY: store.read(layout.REGISTRY)}

    def put(name: AdapterName, number: int) -> None:
        plain = record | {"tenant": name.tenant, "adapter": name.adapter, "version": number}
        many[layout.version(name, number)] = json.dumps(plain).encode()

    def point(name: AdapterName, version: int) -> None:
        targets = (Target(version, first.digest),)
        move = ChannelMove("prod", 1, targets, "set", "", "ana", "2026-01-01T00:00:00+00:00", op="1")
        many[layout.numbered(layout.moves(name, "prod"), 1)] = move_to_bytes(move)

    for number in range(adapters):
        put(AdapterName("many", f"a{number}"), 1)
        point(AdapterName("many", f"a{number}"), 1)
    snapshot = MemoryStore()
    for key, value in many.items():
        snapshot.create(key, value)
    ObjectRegistry(snapshot).reindex("many")
    many |= {key: snapshot.read(key) for key in snapshot.keys(layout.snapshots("many"))}
    for number in range(2, versions + 1):
        put(NAME, number)
    point(NAME, versions)
    return {key: store.read(key) for key in store.keys("")} | many


def to_folder(keys: dict[str, bytes], root: Path) -> None:
    for folder in {(root / key).parent for key in keys}:
        folder.mkdir(parents=True, exist_ok=True)
    for key, value in keys.items():
        (root / key).write_bytes(value)


def to_moto(keys: dict[str, bytes], *, bucket: str, endpoint: str) -> None:
    """Past HTTP, into the backend of the server that runs in this process."""
    import boto3
    from moto.s3.models import s3_backends

    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
    backend = s3_backends["123456789012"]["aws"]
    for key, value in keys.items():
        backend.put_object(bucket, f"team/{key}", value)


@contextmanager
def served() -> Iterator[tuple[str, Callable[[], int]]]:
    """moto's S3 over HTTP in this process, and how many requests it has had."""
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto, requests = DomainDispatcherApplication(create_backend_app), [0]

    def application(environ: Any, start: Any) -> Any:
        requests[0] += 1
        return moto(environ, start)

    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", lambda: requests[0]
    server.shutdown()


if __name__ == "__main__":
    main()
