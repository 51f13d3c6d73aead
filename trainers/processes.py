"""Which of a training's processes this one is: one where nobody says otherwise."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """A process among those of its training. Only the first writes, prints and is heard."""

    rank: int = 0
    world: int = 1  # processes

    @classmethod
    def here(cls) -> Place:
        """As the launcher wrote it into the environment, in torch's words."""
        return cls(rank=int(os.environ.get("RANK", 0)), world=int(os.environ.get("WORLD_SIZE", 1)))

    @property
    def first(self) -> bool:
        return self.rank == 0


def summed(trainer: Any, number: int) -> int:
    """The sum over all processes, each of which must ask at the same place."""
    return _reduced(trainer, number)


def any_of(trainer: Any, asked: bool) -> bool:
    """Whether any process says so; each of them must ask at the same place."""
    return bool(_reduced(trainer, int(asked)))


def _reduced(trainer: Any, number: int) -> int:
    if trainer.args.world_size == 1:
        return number
    import torch

    here = torch.tensor(number, device=trainer.args.device)
    return int(trainer.accelerator.reduce(here, reduction="sum"))


def gathered(trainer: Any) -> Any:
    """The model's whole state on the first process, where FSDP or DeepSpeed shard it; else None. All must ask."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)
