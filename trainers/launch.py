"""One training in several processes of this machine, each with a share of every step's rows.

    launch    here               starts the processes, hears the first one, and ends all where one ends badly
    _enter    in each of them    finds its place, and trains as one process would

Torch's own spawner starts them, accelerate finds the device by the place in the environment: gloo between CPUs, nccl
between GPUs (docs/decisions/0040). What was prepared travels there, so the data are read and checked once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterhub.errors import AdapterHubError, RunFailed, UsageError
from adapterhub.trainers.events import Event, Listener, Stage, ignore
from adapterhub.trainers.fit import Fitted, fit
from adapterhub.trainers.prepare import Prepared

_GRACE = 5.0  # seconds for the others to end by themselves, where one ended badly
Message = Event | Fitted | AdapterHubError


def launch(prepared: Prepared, folder: Path, *, on_event: Listener, resume: bool = False) -> Fitted:
    """Train in as many processes as the config says, as `trainers.fit.fit` does in one.

    Raises as `trainers.fit.fit`, and RunFailed where a process was killed.
    """
    import torch
    import torch.multiprocessing as multiprocessing

    processes = prepared.config.num_processes
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and processes > gpus:
        raise UsageError(
            f"--num-processes {processes}: this machine has {gpus} GPU{'s' * (gpus > 1)}",
            why="every process takes one of its own",
            hint=f"--num-processes {gpus}",
        )
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    on_event(Stage(f"starting {processes} processes"))
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with _environment(processes):
        running = multiprocessing.start_processes(
            _enter, args=(prepared, folder, resume, queue), nprocs=processes, join=False, start_method="spawn"
        )
    return _heard(running, queue, folder, on_event)


def _heard(running: Any, queue: Any, folder: Path, on_event: Listener) -> Fitted:
    """Until all have ended: events go to the listener, signals to the processes."""
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

    fitted: Fitted | None = None
    error: AdapterHubError | None = None
    ended: ProcessExitedException | ProcessRaisedException | None = None
    done = False
    with _forwarded(running, on_event) as stopping:
        while not done:
            try:
                done = running.join(timeout=0.1, grace_period=_GRACE)
            except (ProcessExitedException, ProcessRaisedException) as found:
                done, ended = True, found
            while not queue.empty():
                message: Message = queue.get()
                if isinstance(message, AdapterHubError):
                    error = error or message
                elif isinstance(message, Fitted):
                    fitted = message
                else:
                    on_event(message)
    killed = ended is not None and getattr(ended, "signal_name", None) and not stopping
    if error is not None and not killed:  # of a process that was killed, the others know only that it is gone
        raise error
    if ended is not None and stopping:
        raise _stopped(folder)
    if ended is not None or fitted is None:
        raise _broke(ended, folder)
    return fitted


def _stopped(folder: Path) -> BaseException:
    """Ctrl-C that the processes did not live to answer."""
    from adapterhub.trainers.fit import last_checkpoint
    from adapterhub.trainers.watch import Interrupted

    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return KeyboardInterrupt()
    return Interrupted("stopped", why=f"the last checkpoint is {checkpoint.name}", hint=f"ah train --resume {folder}")


def _broke(ended: Any, folder: Path) -> RunFailed:
    from adapterhub.trainers.fit import LOG, last_checkpoint

    which = f"process {ended.error_index}" if ended else "the first process"
    name = getattr(ended, "signal_name", None)
    how = f"was ended by {name}" if name else "ended before the training was done"
    if name == "SIGKILL":
        how += ", as the system does where memory runs out"
    told = str(ended).strip().splitlines()[-1] if ended and not name else ""
    checkpoint = last_checkpoint(folder)
    return RunFailed(
        f"{which} of the training {how}",
        why=told or "the others were ended too: a step needs all of them",
        hint=f"ah train --resume {folder}" if checkpoint else f"see {folder / LOG}",
    )


@contextlib.contextmanager
def _forwarded(running: Any, on_event: Listener) -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM asks all processes for a checkpoint; the second one ends them. Yields the signals."""
    heard: list[int] = []
    main = threading.current_thread() is threading.main_thread()

    def forward(number: int, frame: Any) -> None:
        heard.append(number)
        if len(heard) == 1:
            on_event(Stage("stopping after this step; once more to stop at once"))
        for process in running.processes:
            if process.is_alive():
                process.terminate() if len(heard) == 1 else process.kill()

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in running.processes:
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def _environment(processes: int) -> Iterator[None]:
    """What the processes inherit: where they meet, and their share of the cores."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // processes)
    added = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # its warnings would go past the log, to the terminal
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _enter(rank: int, prepared: Prepared, folder: Path, resume: bool, queue: Any) -> None:
    """The beginning of a process."""
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    parent = os.getppid()

    def interrupted(number: int, frame: Any) -> None:
        # A terminal's Ctrl-C reaches every process, and the one above passes on what is meant. Where that one is gone
        # the kernel sends this signal, and there is nothing left to train for.
        if os.getppid() != parent:
            os._exit(130)

    signal.signal(signal.SIGINT, interrupted)
    try:
        fitted = fit(prepared, folder, on_event=queue.put if rank == 0 else ignore, resume=resume)
    except AdapterHubError as error:
        queue.put(error)
        sys.exit(1)
    if rank == 0:
        queue.put(fitted)
