"""The streaming merge: one weight file at a time, in blocks, memory bounded whatever the size of the model.

A worker takes a block, reads it, computes, and writes it; several at once keep reading, computing and writing
overlapped, and what is written goes to the disk while the next blocks are made (`output`). What does not change is
cloned with the whole file where the file system shares blocks (btrfs, XFS, bcachefs), else copied range by range, so
that no byte is written twice; or linked, where nothing of a file changes and that is asked for. What is to be quantised
is rounded first to what it would be without that: a quantised model is the plain one, quantised.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

from adapterhub import peftdir
from adapterhub.export import arithmetic
from adapterhub.export.arithmetic import Factors, Product
from adapterhub.export.files import read_into, reflink, sync
from adapterhub.export.layout import Copy, FilePlan, Operation, Rows, blocks
from adapterhub.export.output import InPlace, Output
from adapterhub.export.parallel import in_order
from adapterhub.export.plan import Plan
from adapterhub.export.quantise import quantise
from adapterhub.export.staging import Staging

_SYNC = 2**27  # bytes written between two notes in the journal: what a killed export makes again, at most


def merge(plan: Plan, staging: Staging, *, link: bool = False, progress: Callable[[int], None]) -> None:
    """Write every weight file of the plan into the staging folder, durably; what is there already is kept.

    ``link``: files in which nothing changes become hard links to the base's, where the file system allows it.
    ``progress`` is called with the bytes done so far. Raises OSError, StorageError, Unsupported.
    """
    factors = Factors(plan.adapter.path / peftdir.WEIGHTS)
    with arithmetic.one_thread_a_block(), ThreadPoolExecutor(1, "sync") as syncer:
        durable: list[Future[None]] = []
        before = 0  # bytes of the files before this one
        for file in plan.files:
            target = staging.folder / file.name
            if file.name not in staging.finished and not (link and _linked(file, target)):
                noted = 0
                with closing(_write(file, target, factors, after=staging.partial.get(file.name, 0))) as ends:
                    for end in ends:
                        progress(before + end)
                        if end - noted > _SYNC and all(future.done() for future in durable):
                            durable.append(syncer.submit(_note, staging, file.name, end))
                            noted = end
            if file.name not in staging.finished:
                durable.append(syncer.submit(_finish, staging, file.name))
            before += file.size
            progress(before)
        for future in durable:
            future.result()


def _write(file: FilePlan, target: Path, factors: Factors, *, after: int) -> Generator[int, None, None]:
    """Make one file, and tell after each block how far it is whole. The first ``after`` bytes are there already."""
    cloned = not after and file.source is not None and reflink(file.source, target)
    output = InPlace(target, file.size) if cloned else Output(target, file.size, after=after)
    with closing(output):
        if file.source is None:  # else it is the base's own, and copied with it
            output.write(0, file.header)
        for end in in_order(_jobs(file, output, factors, after=after, cloned=cloned)):
            yield min(end, output.whole)


def _jobs(
    file: FilePlan, output: Output | InPlace, factors: Factors, *, after: int, cloned: bool
) -> Iterator[Callable[[], int]]:
    """One job a block. A tensor's factors are read when its first block comes up, and forgotten with its last."""
    operation: Operation | None = None
    delta: Product | None = None
    for block in blocks(file, cloned=cloned):
        if block.end <= after:
            continue
        if isinstance(block, Copy):
            yield partial(_copy, output, block)
        else:
            if block.operation is not operation:
                operation = block.operation
                delta = factors.product(operation, operation.delta) if operation.delta else None
            yield partial(_rewrite, output, block, delta)


def _copy(output: Output | InPlace, block: Copy) -> int:
    with output.room(block.target, block.length) as parts:
        for begin, view in parts:
            read_into(block.file, block.source + begin, view)
    return block.end


def _rewrite(output: Output | InPlace, rows: Rows, delta: Product | None) -> int:
    if rows.operation.scheme:
        codes, scales = quantise(rows, rows.operation.scheme, arithmetic.rewrite(rows, delta))
        output.write(rows.scales, scales)
        output.write(rows.target, codes)
        return rows.end
    values = arithmetic.values(rows, delta)
    with output.room(rows.target, rows.end - rows.target) as parts:
        for begin, view in parts:
            arithmetic.store(values, rows.operation, begin=begin, into=view)
    return rows.end


def _linked(file: FilePlan, target: Path) -> bool:
    """Whether the file is now the base's own under another name."""
    if file.source is None or not all(operation.kept for operation in file.operations):
        return False
    target.unlink(missing_ok=True)
    try:
        os.link(file.source.resolve(), target)  # of a Hub cache, not its symbolic link
    except OSError:  # another file system, or one without links: it is copied
        return False
    return True


def _note(staging: Staging, name: str, end: int) -> None:
    sync(staging.folder / name)
    staging.record_part(name, end)


def _finish(staging: Staging, name: str) -> None:
    sync(staging.folder / name)
    staging.record(name)
