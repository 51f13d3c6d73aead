"""FSDP and DeepSpeed in transformers' words: what shards a model over the GPUs of several processes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from adapterhub.errors import MissingDependency
from adapterhub.trainers.config import TrainConfig

_RENAMED = {"offload_params": "cpu_offload"}  # Axolotl's and accelerate's name → transformers'


def sharding(config: TrainConfig, *, gpu: bool) -> Mapping[str, Any]:
    """Keyword arguments for transformers' TrainingArguments; none without a GPU, as the config's fates say.

    Raises MissingDependency: the config asks for DeepSpeed, and it is not installed.
    """
    if not gpu:
        return {}
    if config.deepspeed:
        if importlib.util.find_spec("deepspeed") is None:
            raise MissingDependency(
                "deepspeed is not installed", why="the config's deepspeed key asks for it", hint="pip install deepspeed"
            )
        return {"deepspeed": config.deepspeed if isinstance(config.deepspeed, str) else dict(config.deepspeed)}
    if not config.fsdp:
        return {}
    options = {_RENAMED.get(key, key): value for key, value in config.fsdp_config.items()}
    if config.fsdp_version is not None:
        options["version"] = config.fsdp_version
    return {"fsdp": " ".join(config.fsdp), "fsdp_config": options}
