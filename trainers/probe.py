"""How long a training takes on this machine, told by its first steps."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from adapterhub.trainers.arguments import total_steps
from adapterhub.trainers.events import Listener, ignore
from adapterhub.trainers.fit import fit
from adapterhub.trainers.prepare import Prepared
from adapterhub.trainers.watch import METRICS, read_metrics

_WARM_UP, _TIMED = 1, 2  # steps; the first one also pays for what is made once
_EVALUATION = 1 / 3  # of a training step's time a token: the forward pass without the backward one


@dataclass(frozen=True)
class Probe:
    """What the steps took, and what the whole training will."""

    steps: int  # of the whole training
    tokens_per_second: float
    step_seconds: float  # mean over the whole training
    seconds: float  # of the whole training with its evaluations, without loading

    def to_json(self) -> dict[str, float]:
        return {
            "steps": self.steps,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "step_seconds": round(self.step_seconds, 4),
            "seconds": round(self.seconds, 1),
        }


def probe(prepared: Prepared, *, on_event: Listener = ignore) -> Probe:
    """Make three steps of the training, time the last two, and leave nothing behind. Raises as `fit`.

    Time goes by tokens rather than by steps, so that two steps with short rows promise no quick training.
    """
    config = prepared.config
    short = replace(
        config,
        max_steps=_WARM_UP + _TIMED,
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        early_stopping_patience=None,
        loss_watchdog_threshold=None,
        report_to=(),
    )
    with tempfile.TemporaryDirectory(prefix="ah-probe-") as folder:
        fit(replace(prepared, config=short, evaluation=None), Path(folder), on_event=on_event)
        lines = read_metrics(Path(folder) / METRICS)
    first, last = lines[_WARM_UP - 1], lines[-1]
    speed = (last["tokens"] - first["tokens"]) / max(last["seconds"] - first["seconds"], 1e-9)
    steps, epochs = total_steps(prepared), config.num_epochs
    if config.max_steps is not None:
        rows = config.max_steps * config.micro_batch_size * config.gradient_accumulation_steps
        epochs = rows / prepared.train.rows
    training = prepared.train.tokens * epochs / speed
    evaluation = _evaluations(prepared, steps) * (prepared.evaluation.tokens if prepared.evaluation else 0)
    return Probe(steps, speed, training / steps, training + evaluation * _EVALUATION / speed)


def _evaluations(prepared: Prepared, steps: int) -> float:
    """While training, and once at the end."""
    config = prepared.config
    if config.eval_strategy == "no":
        return 1
    if config.eval_strategy == "epoch":
        return max(1, config.num_epochs)
    if config.evals_per_epoch:
        return config.evals_per_epoch * config.num_epochs
    every = config.eval_steps or 500
    return max(1, 1 / every if every < 1 else steps / every)
