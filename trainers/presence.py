"""What a config names and is not on this machine, for a check that downloads nothing."""

from __future__ import annotations

from pathlib import Path

from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.deepspeed import deepspeed_file, read_deepspeed


def absent(config: TrainConfig, beside: Path | None) -> list[str]:
    """The base, the data sets and the DeepSpeed file that are not here, in words.

    A DeepSpeed file that is here is checked. Raises ConfigError where it is not right.
    """
    missing = [] if _has_base(config) else [f"base_model {config.base_model}"]
    for source in (*config.datasets, *config.test_datasets):
        places = [Path(source.path), *([beside / source.path] if beside else [])]
        if not any(place.exists() for place in places):
            missing.append(f"the data set {source.path}")
    file = deepspeed_file(config, beside)
    if file is None or file.is_file():
        read_deepspeed(config, beside)
    else:
        missing.append(f"deepspeed {config.deepspeed}")
    return missing


def _has_base(config: TrainConfig) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(config.base_model).expanduser().is_dir():
        return True
    try:
        return isinstance(try_to_load_from_cache(config.base_model, "config.json", revision=config.model_revision), str)
    except HFValidationError:  # a path, and not here
        return False
