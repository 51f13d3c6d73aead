"""Publishing and pulling a 1 GB adapter on S3, beside `aws s3 cp` of the same file; and what a second publish sends.

    server     `rclone serve s3` on this machine: it takes far less CPU than moto's, which would be what is measured. It
               cannot create unless absent, so the registry is opened with single_writer=true. Its ETags are off: it
               would read and hash a file again for a HEAD (ours after a publish, the peer's before a download),
               which a store that keeps its ETags does not. Its files are in memory.
    publish    `ah publish` as typed: start, read and judge (NaN, zero, shapes), hash, send with checksums, commit
    pull       `ah pull` as typed: resolve, fetch, hash, fsync
    send, get  the registry's own transfer alone: `create_file` and `open` of the store, in a fresh process
    peer       `aws s3 cp` as typed, up and down (awscli from PyPI in an environment of its own)

A key is the hash of what it holds, so a publish reads and hashes everything before its first byte leaves: 0.75 s for
1 GB, where `aws s3 cp` hashes nothing first. The rest of a publish is 0.12 s to start, 0.1 s for small requests, and
the send, which the server bounds (3.5 to 3.9 s whatever the threads, the size of parts and the checksum). So 0.9 of
the peer's 4.45 s is missed by as much as that one pass takes, and only where the store is as fast as this one.

The sides take turns; medians over the rounds. Every round has new bytes. Memory is the peak resident size of the
process that pulls. What a second publish of the same weights sends is counted at the socket, by a proxy.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from machine import machine

BAR = 0.9  # times the throughput of the peer
MEMORY_BAR = 200  # MB
AGAIN_BAR = 64 * 1024  # bytes
MODULES, LAYERS, WIDTH, RANK = ("q_proj", "k_proj", "v_proj", "o_proj"), 40, 8192, 192
BYTES = 2 * 2 * len(MODULES) * LAYERS * WIDTH * RANK  # 1.007 GB in float16
AWS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench-secret", "AWS_DEFAULT_REGION": "us-east-1"}
SEND = """
import sys, hashlib
from adapterhub.registry import open_store
url, path, sha256, size = sys.argv[1:]
with open(path, "rb") as source:
    open_store(url).create_file("bench/" + sha256, source, size=int(size), sha256=sha256)
"""
GET = """
import sys
from adapterhub.registry import open_store
url, path, sha256, size = sys.argv[1:]
with open(path, "wb") as target, open_store(url).open("bench/" + sha256) as source:
    while chunk := source.read(1 << 20):
        target.write(chunk)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--aws", metavar="PROGRAM", help="an `aws` that is there; default: awscli is installed anew")
    parser.add_argument("--write", type=Path, metavar="DIR", help="only write an adapter of 1 GB there")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.write:
        write_adapter(arguments.write, seed=arguments.seed)
        return
    rounds = arguments.rounds
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="ah-bench-") as name, served() as endpoint:
        folder = Path(name)
        aws = [arguments.aws] if arguments.aws else peer(folder / "aws")
        memory = []
        for number in range(rounds + 1):
            once, peak = measure(folder, endpoint, aws, number)
            memory.append(peak)
            for side, value in once.items() if number else ():  # the first warms up, and proves the store
                seconds.setdefault(side, []).append(value)
        again = sent_again(folder, endpoint)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    rows = [
        throughput(side, medians[side], medians[other])
        for side, other in (("publish", "up"), ("pull", "down"), ("send", "up"), ("get", "down"))
    ]
    rows.append(limit("pull_memory", max(memory), "MB", MEMORY_BAR))
    rows.append(limit("second_publish_sent", again, "bytes", AGAIN_BAR))
    print(json.dumps({"rows": rows}))


def throughput(side: str, ours: float, peers: float) -> dict[str, object]:
    return {
        "name": f"s3_{side}_1gb",
        "ours": round(BYTES / 1e6 / ours, 1),
        "peer": round(BYTES / 1e6 / peers, 1),
        "ratio": round(peers / ours, 2),
        "unit": "MB/s",
        "machine": machine(),
        "bar": BAR,
        "met": peers / ours >= BAR,
    }


def limit(name: str, value: float, unit: str, bar: float) -> dict[str, object]:
    row = {"name": f"s3_{name}", "ours": round(value, 1), "peer": bar, "ratio": round(value / bar, 2), "unit": unit}
    return row | {"machine": machine(), "bar": bar, "met": value <= bar}


def measure(folder: Path, endpoint: str, aws: list[str], number: int) -> tuple[dict[str, float], float]:
    """Seconds of each side for one adapter that nobody has seen, and the peak memory of the pull in MB."""
    adapter = folder / "adapter"
    # by a process of its own: a child's peak memory counts what its parent had when it was started
    subprocess.run([sys.executable, __file__, "--write", adapter, "--seed", str(number)], check=True)
    weights = adapter / "adapter_model.safetensors"
    sha256 = subprocess.check_output(["sha256sum", weights], text=True).split()[0]
    url = registry_url(endpoint)
    cp = [*aws, "s3", "cp", "--no-progress", "--endpoint-url", endpoint]
    ah = [sys.executable, "-m", "adapterhub.cli.main"]
    there = f"s3://bench/peer/{number}"
    what = [url, str(weights), sha256, str(weights.stat().st_size)]
    back = [url, str(folder / "got"), *what[2:]]
    sides: dict[str, list[list[str]]] = {
        "peer": [[*cp, str(weights), there], [*cp, there, str(folder / "down")]],
        "ours": [
            [*ah, "publish", str(adapter), "--name", "bench/adapter", "--registry", url],
            [*ah, "pull", "bench/adapter", "--to", str(folder / "pulled"), "--registry", url],
        ],
        "bare": [[sys.executable, "-c", SEND, *what], [sys.executable, "-c", GET, *back]],
    }
    names = {"peer": ("up", "down"), "ours": ("publish", "pull"), "bare": ("send", "get")}
    seconds, peak = {}, 0.0
    for side in list(sides)[:: 1 if number % 2 else -1]:
        for name, command in zip(names[side], sides[side], strict=True):
            seconds[name], memory = timed(command)
            peak = memory if name == "pull" else peak
    check = subprocess.check_output(["sha256sum", folder / "pulled" / weights.name, folder / "down"], text=True)
    assert check.count(sha256) == 2
    shutil.rmtree(folder / "pulled")
    for name in ("down", "got"):
        (folder / name).unlink()
    tidy(endpoint, but=sha256)
    return seconds, peak


def tidy(endpoint: str, *, but: str) -> None:
    """Remove what is large: the disk is not what is measured."""
    import boto3

    keys = {"aws_access_key_id": AWS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": AWS["AWS_SECRET_ACCESS_KEY"]}
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="bench"):
        for item in page.get("Contents", ()):
            if item["Size"] > 2**20 and but not in item["Key"]:
                client.delete_object(Bucket="bench", Key=item["Key"])


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds, and MB at the peak, of a command."""
    os.sync()  # nobody pays for what another left unwritten
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | AWS)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {' '.join(command[:6])} … exited with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def sent_again(folder: Path, endpoint: str) -> int:
    """Bytes that the second publish of the same weights sends, requests and heads included."""
    adapter = folder / "adapter"
    ah = [sys.executable, "-m", "adapterhub.cli.main", "publish", str(adapter), "--name", "bench/again", "--registry"]
    timed([*ah, registry_url(endpoint)])
    with counted(endpoint) as (through, count):
        timed([*ah, registry_url(through)])
    return count[0]


def registry_url(endpoint: str) -> str:
    return f"s3://bench/registry?endpoint={endpoint}&single_writer=true"


def peer(folder: Path) -> list[str]:
    """`aws` in an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", "awscli"], check=True)
    return [str(folder / "bin" / "aws")]


@contextmanager
def served() -> Iterator[str]:
    """rclone's S3 over a folder in memory, where there is one: its disk is not what is measured."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="ah-bench-", dir=memory if memory.is_dir() else None) as name:
        yield from serving(Path(name))


def serving(folder: Path) -> Iterator[str]:
    (folder / "bench").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = Path(sys.executable).with_name("rclone")
    keys = f"{AWS['AWS_ACCESS_KEY_ID']},{AWS['AWS_SECRET_ACCESS_KEY']}"
    command = [program, "serve", "s3", "--addr", address, "--auth-key", keys, "--etag-hash", "", folder]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        while "Starting s3 server" not in server.stderr.readline():
            pass
        threading.Thread(target=server.stderr.read, daemon=True).start()
        try:
            yield f"http://{address}"
        finally:
            server.terminate()


@contextmanager
def counted(endpoint: str) -> Iterator[tuple[str, list[int]]]:
    """A relay to the server that counts what clients send: every byte, heads too."""
    host, port = endpoint.removeprefix("http://").split(":")
    count, lock = [0], threading.Lock()
    listener = socket.create_server(("127.0.0.1", 0))

    def relay(source: socket.socket, target: socket.socket, *, counts: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if counts:
                    with lock:
                        count[0] += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection((host, int(port)))
            threading.Thread(target=relay, args=(client, server), kwargs={"counts": True}, daemon=True).start()
            threading.Thread(target=relay, args=(server, client), kwargs={"counts": False}, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", count
    listener.close()


def write_adapter(path: Path, *, seed: int) -> Path:
    import numpy as np
    from safetensors.numpy import save_file

    path.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**16, size=2 * RANK * WIDTH + LAYERS * len(MODULES), dtype=np.uint16) & 0xBBFF  # finite
    noise = bits.view(np.float16)
    tensors = {}
    for layer in range(LAYERS):
        for at, module in enumerate(MODULES):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            start = layer * len(MODULES) + at
            half = RANK * WIDTH
            tensors[f"{prefix}.lora_A.weight"] = noise[start : start + half].reshape(RANK, WIDTH)
            tensors[f"{prefix}.lora_B.weight"] = noise[start + half : start + 2 * half].reshape(WIDTH, RANK)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(MODULES)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    main()
