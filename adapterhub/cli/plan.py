"""`ah plan`: parameters, adapter size and memory of a training, before anything is downloaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterhub.cli.output import JsonOption, print_json, print_table, say
from adapterhub.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.trainers import TrainConfig
    from adapterhub.trainers.probe import Probe

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G)?", re.IGNORECASE)


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yml", help="The training to plan.")],
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="SIZE", help="Memory of a GPU, e.g. 24GB: says what fits it.")
    ] = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Read the data, make three steps on this machine, and say how long it takes."),
    ] = False,
    allow_unknown_keys: Annotated[
        bool, typer.Option("--allow-unknown-keys", help="Note unknown keys instead of refusing them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a training will take, from the base's config.json alone; --probe also needs its weights and the data."""
    from adapterhub.trainers import Machine, base_config, read_config, read_yaml
    from adapterhub.trainers import plan as make

    limit = _bytes(gpu) if gpu else None
    machine = Machine(gpu=True) if limit else Machine.here()
    read = read_config(read_yaml(config), machine=machine, allow_unknown_keys=allow_unknown_keys).config
    base = base_config(read.base_model, revision=read.model_revision)
    found = make(read, base, gpu=machine.gpu, limit=limit)
    timed = _probed(config, allow_unknown_keys=allow_unknown_keys) if probe else None
    if as_json:
        print_json(found.to_json() | ({"probe": timed.to_json()} if timed else {}))
        return
    share = found.trainable / found.parameters
    say(f"{found.base}: {found.parameters:,} parameters, {found.trainable:,} trained ({share:.2%})")
    say(f"adapter: {found.adapter_bytes / 1e6:,.1f} MB")
    print_table(("part", "GB"), [(part, f"{size / 1e9:.2f}") for part, size in found.memory.to_json().items()])
    if timed is not None:
        whole = timedelta(seconds=round(timed.seconds))
        say(
            f"time: {timed.steps} steps of {timed.step_seconds:.2f} s, {whole} in all "
            f"({timed.tokens_per_second:.0f} tokens/s on this machine)"
        )
    if limit is None:
        _say_room(read, base, gpu=machine.gpu)
        return
    if found.fits is None:
        say(f"[yellow]does not fit {gpu}:[/] lower sequence_len or lora_r, or take a smaller base")
    elif found.fits:
        say(f"fits {gpu} with " + ", ".join(f"{k}: {str(v).lower()}" for k, v in found.fits.items()))
    else:
        say(f"fits {gpu} as it is")


def _say_room(config: TrainConfig, base: Mapping[str, Any], *, gpu: bool) -> None:
    from adapterhub.trainers.room import room, too_little

    free = room()
    if free is None or free.gpu != gpu:
        return
    warning = too_little(config, base, free)
    say(f"[yellow]too little memory:[/] {warning}" if warning else f"fits what {free.owner} has free")


def _probed(config: Path, *, allow_unknown_keys: bool) -> Probe:
    from adapterhub.cli.progress import shown
    from adapterhub.trainers import prepare, read_config, read_yaml
    from adapterhub.trainers.probe import probe

    read = read_config(read_yaml(config), allow_unknown_keys=allow_unknown_keys).config
    prepared = prepare(read, beside=dict.fromkeys(("datasets", "test_datasets", "config"), config.parent))
    with shown() as listener:
        return probe(prepared, on_event=listener)


def _bytes(written: str) -> int:
    match = _SIZE.fullmatch(written.strip())
    if match is None or float(match[1]) <= 0:
        raise UsageError(
            f"--gpu {written!a} is no size", why="expects a size like 24GB", hint="ah plan config.yml --gpu 24GB"
        )
    return int(float(match[1]) * (2**30 if (match[2] or "").lower() == "gib" else 10**9))
