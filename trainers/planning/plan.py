"""What a training will take, told before anything but the base's ``config.json`` is there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub.errors import NotFound
from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.dialect.rules import changes_the_base
from adapterhub.trainers.planning.memory import GB, Memory, Setup, memory
from adapterhub.trainers.planning.shapes import adapted, lora_parameters, model_shape


@dataclass(frozen=True)
class Plan:
    """Counts of parameters, bytes of memory, and the first settings that fit a GPU."""

    base: str
    parameters: int
    trainable: int
    adapter_bytes: int  # of the file that is published
    memory: Memory
    fits: Mapping[str, Any] | None  # keys to change, empty where it fits as it is; None where nothing asked for fits

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "parameters": self.parameters,
            "trainable": self.trainable,
            "adapter_bytes": self.adapter_bytes,
            "memory": self.memory.to_json(),
            "fits": self.fits,
        }


def plan(config: TrainConfig, base_config: Mapping[str, Any], *, gpu: bool, limit: int | None = None) -> Plan:
    """Plan a training on one device.

    Args:
        gpu: bfloat16 with the loss in chunks; otherwise the loss at trained positions, in float32 unless the config was
            read for a CPU that multiplies bfloat16.
        limit: bytes of the device; None: not asked whether it fits.

    Raises ConfigError for targets that the base does not have, Unsupported for a config of no language model.
    """
    shape = model_shape(base_config, name=config.base_model)
    setup = _setup(config, gpu=gpu)
    trainable = lora_parameters(shape, rank=config.lora_r, targets=config.lora_target_modules)
    if config.peft_use_dora:  # a magnitude for each output
        trainable += sum(linear.outputs for linear in adapted(shape, config.lora_target_modules))
    saved = 2 if changes_the_base(config.peft_init_lora_weights) else 1  # converted to twice the rank
    fits: Mapping[str, Any] | None = None
    if limit is not None:
        fits = next((keys for keys, s in _cheaper(config, setup) if memory(shape, s).total <= limit), None)
    return Plan(
        base=config.base_model,
        parameters=shape.parameters,
        trainable=trainable,
        adapter_bytes=trainable * setup.adapter_bytes * saved,
        memory=memory(shape, setup),
        fits=fits,
    )


def base_config(name: str, *, revision: str | None = None) -> Mapping[str, Any]:
    """A base's ``config.json``, by folder or Hub id. Raises NotFound."""
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            file = folder / "config.json"
        else:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(name, "config.json", revision=revision))
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:  # the Hub's errors are among them
        raise NotFound(
            f"the base {name} has no config.json that can be read",
            why=str(error).strip().splitlines()[0],
            hint="check the spelling, log in with `hf auth login`, or name a model folder",
        ) from error
    if not isinstance(found, dict):
        raise NotFound(f"the base {name} has no config.json that can be read", why="it is no JSON object")
    return found


def _setup(config: TrainConfig, *, gpu: bool) -> Setup:
    half = gpu or config.bf16 is True
    eight_bit = config.optimizer.endswith("8bit")
    return Setup(
        rank=config.lora_r,
        micro_batch=config.micro_batch_size,
        tokens=config.sequence_len,
        targets=config.lora_target_modules,
        base_bits=4 if config.load_in_4bit else 8 if config.load_in_8bit else 16 if half else 32,
        compute_bytes=2 if half else 4,
        optimizer="adam8bit" if eight_bit else "adam" if "adam" in config.optimizer else config.optimizer,
        checkpointing=config.gradient_checkpointing,
        eager_attention=config.attn_implementation == "eager",
        dropout=config.lora_dropout > 0,
        logits="chunked" if gpu else "trained",
        models=1 if config.rl in (None, "kto") else 2,
        eval_batch=config.eval_batch_size if config.val_set_size or config.test_datasets else 0,
        runtime=GB if gpu else GB * 7 // 10,
    )


def _cheaper(config: TrainConfig, setup: Setup) -> Iterator[tuple[dict[str, Any], Setup]]:
    """Settings from the quickest to the leanest: what costs no quality and the least time is tried first."""
    for bits in (setup.base_bits,) if setup.base_bits == 4 else (setup.base_bits, 4):
        quantised = {} if bits == setup.base_bits else {"adapter": "qlora", "load_in_4bit": True}
        batch, accumulation = setup.micro_batch, config.gradient_accumulation_steps
        while True:
            smaller = {} if batch == setup.micro_batch else {
                "micro_batch_size": batch, "gradient_accumulation_steps": accumulation
            }  # fmt: skip
            for checkpointing in (False, True) if not setup.checkpointing else (True,):
                keys = {**quantised, **smaller}
                if checkpointing and not setup.checkpointing:
                    keys["gradient_checkpointing"] = True
                yield (
                    keys,
                    replace(
                        setup,
                        base_bits=bits,
                        micro_batch=batch,
                        checkpointing=checkpointing,
                        eval_batch=min(setup.eval_batch, batch),
                    ),
                )
            if batch % 2:
                break
            batch, accumulation = batch // 2, accumulation * 2
