"""The streaming merge: one weight file at a time, in blocks, memory bounded whatever the size of the model.

A worker takes a block, reads it, computes, and writes it; several at once keep reading, computing and writing
overlapped, and a finished file goes to the disk while the next one is made. What does not change is cloned with the
whole file where the file system shares blocks (btrfs, XFS, bcachefs), else copied range by range, so that no byte is
written twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

from adapterhub import peftdir
from adapterhub.export import arithmetic
from adapterhub.export.arithmetic import Product
from adapterhub.export.files import copy_range, read_at, reflink, sync, write_at
from adapterhub.export.layout import WIDTH, Copy, FilePlan, Operation, Rows, blocks
from adapterhub.export.parallel import in_order
from adapterhub.export.plan import Plan
from adapterhub.export.staging import Staging


def merge(plan: Plan, staging: Staging, *, progress: Callable[[int], None]) -> None:
    """Write every weight file of the plan into the staging folder, durably; files that are there already are kept.

    ``progress`` is called with the bytes done so far. Raises OSError, StorageError, Unsupported.
    """
    weights = plan.adapter.path / peftdir.WEIGHTS
    with arithmetic.one_thread_a_block(), ThreadPoolExecutor(1, "sync") as syncer:
        durable: list[Future[None]] = []
        before = 0  # bytes of the files before this one
        for file in plan.files:
            if file.name not in staging.finished:
                done = before
                with closing(in_order(_jobs(file, staging.folder / file.name, weights))) as parts:
                    for written in parts:
                        done += written
                        progress(done)
                durable.append(syncer.submit(_finish, staging, file.name))
            before += file.size
            progress(before)
        for future in durable:
            future.result()


def _jobs(file: FilePlan, target: Path, weights: Path) -> Iterator[Callable[[], int]]:
    """One job a block. A tensor's factors are read when its first block comes up, and forgotten with its last."""
    cloned = file.same_layout and reflink(file.source, target)
    if not cloned:
        with target.open("wb") as new:
            new.truncate(file.size)
            new.write(file.header)
    operation: Operation | None = None
    delta: Product | None = None
    for block in blocks(file, cloned=cloned):
        if isinstance(block, Copy):
            yield partial(_copy, file.source, target, block)
        else:
            if block.operation is not operation:
                operation = block.operation
                delta = arithmetic.product(operation.delta, weights) if operation.delta else None
            yield partial(_rewrite, file.source, target, block, delta)


def _copy(source: Path, target: Path, block: Copy) -> int:
    copy_range(source, block.source, target, block.target, block.length)
    return block.length


def _rewrite(source: Path, target: Path, rows: Rows, delta: Product | None) -> int:
    raw = read_at(source, rows.source, rows.elements * WIDTH[rows.operation.source.dtype])
    new = arithmetic.rewrite(raw, rows, delta)
    write_at(target, rows.target, new)
    return len(new)


def _finish(staging: Staging, name: str) -> None:
    sync(staging.folder / name)
    staging.record(name)
