"""One training on the workers of a Ray cluster (``use_ray: true``), or of this machine where there is none.

Ray Train starts the workers and joins them to one group; what each does is what `trainers.fit.fit` does anywhere. The
run folder must be the same for all of them: on several machines, a shared file system. ``RAY_ADDRESS`` names a cluster.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterhub.errors import AdapterHubError, MissingDependency, RunFailed
from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.events import Listener, Stage, ignore
from adapterhub.trainers.fit import LOG, Fitted, fit
from adapterhub.trainers.prepare import Prepared

NOT_STARTED = "Ray did not start"


def launch_on_ray(prepared: Prepared, folder: Path, *, on_event: Listener, resume: bool = False) -> Fitted:
    """Train on ``ray_num_workers`` workers, as `trainers.fit.fit` does in one process.

    Raises as that one, RunFailed where a worker dies, and MissingDependency: the ``ray`` extra is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    try:
        import ray
        from ray.exceptions import RayError
        from ray.train import RunConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError
        from ray.util.queue import Queue
    except ImportError as error:
        raise MissingDependency(
            "use_ray needs Ray Train", why=str(error), hint='pip install "adapterhub[ray]"'
        ) from error
    where = folder.absolute()
    on_event(Stage(f"starting {prepared.config.ray_num_workers} Ray workers"))
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises just that where its own processes do not come up
            raise RunFailed(NOT_STARTED, why=str(error), hint="see /tmp/ray/session_latest/logs") from error
    try:
        messages = Queue(actor_options={"num_cpus": 0})
        job = {"prepared": prepared, "folder": str(where), "resume": resume, "messages": messages}
        trainer = TorchTrainer(
            _work,
            train_loop_config=job,
            scaling_config=_scaling(prepared.config),
            run_config=RunConfig(name="ray", storage_path=str(where)),
        )
        with _heard(messages, on_event) as heard:
            try:
                trainer.fit()
            except (TrainingFailedError, RayError) as error:
                heard.broken = error
        return heard.result(where)
    finally:
        if ours:
            ray.shutdown()


def _scaling(config: TrainConfig) -> Any:
    import torch
    from ray.train import ScalingConfig

    return ScalingConfig(
        num_workers=config.ray_num_workers,
        use_gpu=torch.cuda.is_available(),
        resources_per_worker=dict(config.resources_per_worker) or None,
    )


def _work(job: Mapping[str, Any]) -> None:
    """What every worker does; Ray has put its place into the environment and joined the group."""
    import ray.train

    first = ray.train.get_context().get_world_rank() == 0
    tell = job["messages"].put
    try:
        fitted = fit(job["prepared"], Path(job["folder"]), on_event=tell if first else ignore, resume=job["resume"])
    except AdapterHubError as error:
        tell(error)
        raise
    if first:
        tell(fitted)


class _Heard:
    """What the workers said."""

    def __init__(self) -> None:
        self.fitted: Fitted | None = None
        self.error: AdapterHubError | None = None
        self.broken: Exception | None = None

    def result(self, folder: Path) -> Fitted:
        if self.error is not None:
            raise self.error
        if self.broken is not None or self.fitted is None:
            told = str(self.broken).strip().splitlines() if self.broken else ["no worker came to the end"]
            raise RunFailed(
                "the training on Ray broke off", why=told[-1], hint=f"ah train --resume {folder}; see {folder / LOG}"
            ) from self.broken
        return self.fitted


@contextlib.contextmanager
def _heard(messages: Any, on_event: Listener) -> Iterator[_Heard]:
    """Inside, a thread passes events on; afterwards nothing that was said is left unheard."""
    heard, done = _Heard(), threading.Event()

    def listen() -> None:
        from ray.util.queue import Empty

        while True:
            ended = done.is_set()
            try:
                message = messages.get(timeout=0.2)
            except (Empty, queue.Empty):
                if ended:
                    return
                continue
            if isinstance(message, AdapterHubError):
                heard.error = heard.error or message
            elif isinstance(message, Fitted):
                heard.fitted = message
            else:
                on_event(message)

    listener = threading.Thread(target=listen, name="ray events", daemon=True)
    listener.start()
    try:
        yield heard
    finally:
        done.set()
        listener.join()
