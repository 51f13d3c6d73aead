"""Out of memory: what the plan says of it, what to lower, and a smaller micro batch that trains the same."""

from __future__ import annotations

from dataclasses import replace

from adapterhub.errors import AdapterHubError, RunFailed
from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.planning.memory import GB, Memory
from adapterhub.trainers.planning.plan import plan
from adapterhub.trainers.prepare import Prepared

_LOWER = {
    "weights": "take adapter: qlora with load_in_4bit: true, or a smaller base",
    "activations": "lower micro_batch_size or sequence_len, or set gradient_checkpointing: true",
    "logits": "lower micro_batch_size or sequence_len",
    "evaluation": "lower eval_batch_size",
}


class OutOfMemory(RunFailed):
    """The device or the machine had no more memory."""


def is_out_of_memory(text: str) -> bool:
    return "out of memory" in text.lower() or "can't allocate memory" in text.lower()


def out_of_memory(prepared: Prepared, text: str, *, gpu: bool) -> OutOfMemory:
    """The error, with the plan's parts, largest first, and what lowers what."""
    try:
        found = plan(prepared.config, prepared.base.config, gpu=gpu).memory
    except AdapterHubError:  # a base that cannot be planned can still be too large
        return OutOfMemory("out of memory", why=text, hint=_LOWER["activations"])
    largest = sorted(_parts(found).items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {size / GB:.1f} GB" for name, size in largest if size >= GB / 20)
    asked = [_LOWER[name] for name, _ in largest if name in _LOWER]
    smaller = smaller_batch(prepared.config) is not None
    return OutOfMemory(
        "out of memory",
        why=f"{text}; planned: {shown or 'less than 0.1 GB'}",
        hint=("add --auto-batch, or " if smaller else "") + asked[0],
    )


def smaller_batch(config: TrainConfig) -> TrainConfig | None:
    """Half the micro batch, twice the accumulation: the same rows a step. None where it cannot be halved.

    KTO needs two rows at once, to measure each against the other's answer.
    """
    if config.micro_batch_size % 2 or (config.rl == "kto" and config.micro_batch_size == 2):
        return None
    half = config.micro_batch_size // 2
    return replace(
        config,
        micro_batch_size=half,
        eval_batch_size=min(config.eval_batch_size, half),
        gradient_accumulation_steps=2 * config.gradient_accumulation_steps,
    )


def _parts(found: Memory) -> dict[str, int]:
    return {name: size for name, size in found.to_json().items() if name not in ("total", "runtime")}
