"""The trainer's ear and brake: callbacks → events and metrics.jsonl; signals → a checkpoint and a clean stop."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterhub.errors import RunFailed
from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.events import Evaluated, Listener, Stage, Started, Step
from adapterhub.trainers.processes import Place, any_of, summed

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
REWARDS = {"rewards/margins": "reward_margin", "rewards/accuracies": "reward_accuracy"}  # of preferences


class Interrupted(RunFailed):
    """Ctrl-C or SIGTERM; a checkpoint was saved."""

    exit_code = 130


def mean_loss(metrics: Path) -> float:
    """Mean training loss over all steps that ``metrics.jsonl`` tells of, each line weighted by its steps."""
    total, before = 0.0, 0
    for line in read_metrics(metrics):
        if line.get("loss") is not None:
            total += (line["step"] - before) * line["loss"]
            before = line["step"]
    return total / max(before, 1)


def read_metrics(metrics: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; none where it was never begun."""
    try:
        return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []


def forget_after(metrics: Path, step: int) -> None:
    """Drop the lines of steps that will be made again."""
    kept = [json.dumps(line) + "\n" for line in read_metrics(metrics) if line["step"] <= step]
    metrics.write_text("".join(kept), encoding="utf-8")


def watch_class() -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Turns the trainer's callbacks into our events and metrics; stops it on request."""

        def __init__(self, metrics: Path, on_event: Listener, config: TrainConfig) -> None:
            self.metrics, self.on_event, self.config = metrics, on_event, config
            self.high = 0  # logged steps in a row with a loss above the watchdog's threshold
            self.trainer: Any = None
            self.stop = False  # asked for from outside
            self.broken: tuple[int, float] | None = None  # step and loss that is no number
            self.barked: tuple[int, float] | None = None  # step and loss at which the watchdog ended the run
            self.began = self.last = 0.0
            self.first_step = self.step = self.total = 0
            self.evals: dict[int, dict[str, float]] = {}  # step → eval_loss, and the rewards of preferences
            self.tokens_before = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = self.last = time.monotonic()
            self.first_step, self.total = state.global_step, state.max_steps
            self.on_event(Started(steps=state.max_steps, done=state.global_step))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.step = state.global_step
            self.stop = any_of(self.trainer, self.stop)
            if self.stop:
                control.should_save = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logs = logs or {}
            if "loss" in logs:
                self._step(state, control, logs)
            elif "eval_loss" in logs:
                loss, rewards = float(logs["eval_loss"]), _rewards(logs, "eval_")
                found = {"eval_loss": loss} | {f"eval_{name}": value for name, value in rewards.items()}
                self.evals[state.global_step] = found
                self._write({"step": state.global_step, "epoch": _epoch(state), **found})
                self.on_event(Evaluated(state.global_step, loss, **rewards))

        def _step(self, state: Any, control: Any, logs: Any) -> None:
            now, step, loss = time.monotonic(), state.global_step, float(logs["loss"])
            seen = summed(self.trainer, self.trainer.tokens_seen)
            speed = (seen - self.tokens_before) / max(now - self.last, 1e-9)
            self.last, self.tokens_before = now, seen
            if not math.isfinite(loss):
                self.broken = (step, loss)
                control.should_training_stop = True
            threshold = self.config.loss_watchdog_threshold
            self.high = self.high + 1 if threshold is not None and loss > threshold else 0
            if self.high >= self.config.loss_watchdog_patience:
                self.barked = (step, loss)
                control.should_training_stop = True
            done = step - self.first_step
            left = (now - self.began) / max(done, 1) * (self.total - step)
            rate = float(logs.get("learning_rate", 0.0))
            gradient = float(logs.get("grad_norm", 0.0))
            self._write(
                {
                    "step": step,
                    "epoch": _epoch(state),
                    "loss": loss if math.isfinite(loss) else None,
                    "learning_rate": rate,
                    "grad_norm": gradient if math.isfinite(gradient) else None,
                    "tokens": seen,
                    "tokens_per_second": round(speed, 1),
                    "seconds": round(now - self.began, 3),
                    **_rewards(logs, ""),
                }
            )
            self.on_event(Step(step, self.total, state.epoch or 0.0, loss, rate, speed, left))

        def _write(self, line: dict[str, Any]) -> None:
            if not Place.here().first:
                return
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

        def raise_if_stopped(self, folder: Path) -> None:
            if self.broken:
                raise RunFailed(
                    f"the loss is {self.broken[1]} at step {self.broken[0]}",
                    why="the training diverged; nothing of it can be used",
                    hint="lower learning_rate, or raise warmup_steps",
                )
            if self.barked:
                raise RunFailed(
                    f"the loss is {self.barked[1]:.4g} at step {self.barked[0]}",
                    why=f"above loss_watchdog_threshold {self.config.loss_watchdog_threshold:g} for {self.high} "
                    "logged steps in a row",
                    hint="lower learning_rate, look at the data with --show-labels 3, or raise the threshold",
                )
            if self.stop and self.step < self.total:
                raise Interrupted(
                    f"stopped at step {self.step} of {self.total}",
                    why=f"a checkpoint is in {folder / CHECKPOINTS}",
                    hint=f"ah train --resume {folder}",
                )

    return Watch


def _rewards(logs: dict[str, Any], prefix: str) -> dict[str, float]:
    return {ours: float(logs[prefix + theirs]) for theirs, ours in REWARDS.items() if prefix + theirs in logs}


def _epoch(state: Any) -> float:
    return round(state.epoch or 0.0, 4)


def remove_printers(trainer: Any) -> None:
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


@contextlib.contextmanager
def stop_on_signal(watch: Any) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the training after the step at hand; the second one ends it at once.

    One of several processes is told by the one that started it, and only once: `trainers.launch`.
    """
    several = Place.here().world > 1
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if watch.stop and not several:
            raise KeyboardInterrupt
        watch.stop = True
        if several:
            return
        watch.on_event(Stage("stopping after this step; once more to stop at once"))

    heard = (signal.SIGTERM,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
