"""Trackers: TensorBoard, Weights & Biases, MLflow and trackio, through transformers' own callbacks."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from adapterhub.errors import MissingDependency
from adapterhub.trainers.config import TrainConfig

TENSORBOARD = "tensorboard"  # the folder of its event files, in the run
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
_PACKAGES |= {"mlflow": ("mlflow",), "trackio": ("trackio",)}


def ready_trackers(config: TrainConfig, folder: Path) -> None:
    """Tell the trackers where to write; they read their own environment variables, and a user's win over a config's.

    Raises MissingDependency: a tracker that the config asks for is not installed.
    """
    for tracker in config.report_to:
        if not any(importlib.util.find_spec(package) for package in _PACKAGES[tracker]):
            raise MissingDependency(
                f"report_to: {tracker} is not installed",
                why="the config asks for it",
                hint=f"pip install {_PACKAGES[tracker][0]}, or take it out: report.html shows the curves too",
            )
    wanted = {
        "WANDB_PROJECT": config.wandb_project,
        "WANDB_ENTITY": config.wandb_entity,
        "MLFLOW_TRACKING_URI": config.mlflow_tracking_uri,
        "MLFLOW_EXPERIMENT_NAME": config.mlflow_experiment_name,
    }
    for name, value in wanted.items():
        if value:
            os.environ.setdefault(name, value)
    if "tensorboard" in config.report_to:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / TENSORBOARD)
