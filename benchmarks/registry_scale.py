"""A large registry: `@prod` of an adapter with 100,000 versions, and the list of a tenant with 10,000 adapters.

On S3 over HTTP (moto's server) requests are counted at the server; a local folder is timed. Each beside the same
question to a small registry (10 versions, 10 adapters): the size is what must not matter. The registries are written
key by key, as publishers would have left them days ago, and their tenants have a listing snapshot.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
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
from adapterhub.registry import ObjectRegistry, Store, layout, open_store
from adapterhub.registry.base import ChannelMove, Target
from adapterhub.registry.entries import move_to_bytes

NAME = AdapterName("acme", "support")
SMALL = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=100_000)
    parser.add_argument("--adapters", type=int, default=10_000)
    arguments = parser.parse_args()
    os.environ.update(AWS)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ah-bench-") as folder:
        with counted() as (endpoint, count):
            s3 = {size: f"s3://models/{size}?endpoint={endpoint}" for size in ("large", "small")}
            fill(s3["large"], Path(folder) / "a", arguments.versions, arguments.adapters)
            fill(s3["small"], Path(folder) / "b", SMALL, SMALL)
            resolved = {size: asked(url, resolve, count)[0] for size, url in s3.items()}
            rows.append(row("resolve_requests_s3", resolved["large"], resolved["small"], "requests", 4))
            for url in s3.values():
                ObjectRegistry(open_store(url)).reindex("many")
            requests, seconds = asked(s3["large"], listed, count)
            small = asked(s3["small"], listed, count)
            rows.append(row("ls_requests_s3", requests, small[0], "requests", 15))
            rows.append(row("ls_seconds_s3", seconds, small[1], "s", 3))
        local = {size: f"{folder}/{size}" for size in ("large", "small")}
        fill(local["large"], Path(folder) / "c", arguments.versions, arguments.adapters)
        fill(local["small"], Path(folder) / "d", SMALL, SMALL)
        times = {size: 1000 * asked(url, resolve, lambda: 0)[1] for size, url in local.items()}
        rows.append(row("resolve_local", times["large"], times["small"], "ms", 50))
    print(json.dumps({"rows": rows}))


def row(name: str, large: float, small: float, unit: str, bar: float) -> dict[str, Any]:
    shown = {"name": name, "ours": round(large, 2), "peer": round(small, 2), "ratio": round(large / small, 2)}
    return shown | {"unit": unit, "machine": machine(), "bar": bar, "met": large <= bar}


def asked(url: str, question: Callable[[ObjectRegistry], object], count: Callable[[], int]) -> tuple[int, float]:
    """Requests and seconds of one question to a registry that was just opened; medians of five."""
    requests, seconds = [], []
    for _ in range(5):
        registry, before, start = ObjectRegistry(open_store(url)), count(), time.perf_counter()
        question(registry)
        seconds.append(time.perf_counter() - start)
        requests.append(count() - before)
    return int(statistics.median(requests)), statistics.median(seconds)


def resolve(registry: ObjectRegistry) -> object:
    return registry.resolve(AdapterRef(NAME, channel="prod"))


def listed(registry: ObjectRegistry) -> object:
    return registry.overview("many")


def fill(url: str, drafts: Path, versions: int, adapters: int) -> None:
    """``acme/support`` with so many versions, and so many adapters of the tenant ``many``, each with one in prod."""
    store = open_store(url)
    drafts.mkdir()
    first = ObjectRegistry(store).publish(new_draft(drafts / "1"), name=NAME, author="ana")
    record = first.to_json()

    def put(name: AdapterName, number: int) -> None:
        plain = record | {"tenant": name.tenant, "adapter": name.adapter, "version": number}
        store.create(layout.version(name, number), json.dumps(plain).encode(), lasting=False)

    for number in range(2, versions + 1):
        put(NAME, number)
    point(store, NAME, versions, first.digest)
    for number in range(adapters):
        name = AdapterName("many", f"a{number}")
        put(name, 1)
        point(store, name, 1, first.digest)


def point(store: Store, name: AdapterName, version: int, digest: str) -> None:
    move = ChannelMove("prod", 1, (Target(version, digest),), "set", "", "ana", "2026-01-01T00:00:00+00:00", op="1")
    store.create(layout.numbered(layout.moves(name, "prod"), 1), move_to_bytes(move), lasting=False)


@contextmanager
def counted() -> Iterator[tuple[str, Callable[[], int]]]:
    """moto's S3 over HTTP in this process, and how many requests it has had."""
    import logging

    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto, requests = DomainDispatcherApplication(create_backend_app), [0]

    def application(environ: Any, start: Any) -> Any:
        requests[0] += 1
        return moto(environ, start)

    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="models")
    yield endpoint, lambda: requests[0]
    server.shutdown()


if __name__ == "__main__":
    main()
