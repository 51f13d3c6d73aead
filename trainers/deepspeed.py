"""DeepSpeed's configuration: a JSON file beside the config, or what one holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterhub.errors import ConfigError
from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.dialect.sharding import check_deepspeed


def deepspeed_file(config: TrainConfig, beside: Path | None) -> Path | None:
    """The file that ``deepspeed`` names, beside the config or from the working directory; None where it names none."""
    if not isinstance(config.deepspeed, str):
        return None
    near = beside / config.deepspeed if beside else Path(config.deepspeed)
    return near if near.is_file() else Path(config.deepspeed)


def read_deepspeed(config: TrainConfig, beside: Path | None) -> Mapping[str, Any] | None:
    """What ``deepspeed`` holds, checked; None where it is not set.

    Raises ConfigError: the file is missing or no JSON, has a key that DeepSpeed does not have, or sets another batch
    than the config.
    """
    file = deepspeed_file(config, beside)
    if file is None:
        found = config.deepspeed
    else:
        try:
            found = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"deepspeed: {config.deepspeed} cannot be read",
                why=(error.strerror if isinstance(error, OSError) else None) or str(error),
                hint="name a JSON file, or write its content: deepspeed: {zero_optimization: {stage: 2}}",
            ) from error
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ConfigError(f"deepspeed: {config.deepspeed} is no JSON object")
    try:
        check_deepspeed(found)
    except ValueError as error:
        raise ConfigError(f"deepspeed: {file or 'the mapping'} {error}") from error
    for key, value in (
        ("train_micro_batch_size_per_gpu", config.micro_batch_size),
        ("gradient_accumulation_steps", config.gradient_accumulation_steps),
    ):
        if found.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f"deepspeed: {key} is {found[key]}, and the config says {value}",
                why="both speak of the same batch",
                hint=f'write "{key}": "auto" in the DeepSpeed file',
            )
    return found
