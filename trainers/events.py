"""What a training tells while it runs. Only the CLI prints; everybody else may listen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Something that takes a while has begun."""

    text: str


@dataclass(frozen=True)
class Started:
    """The first step is about to be made."""

    steps: int  # optimizer steps of the whole training
    done: int  # steps made before, where a run goes on


@dataclass(frozen=True)
class Step:
    """One optimizer step is done."""

    step: int
    steps: int
    epoch: float
    loss: float | None  # mean over trained tokens, in nats; None between log lines
    learning_rate: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Evaluated:
    """The evaluation data was gone through once."""

    step: int
    loss: float
    reward_margin: float | None = None  # of preferences: how much better the chosen answers are, in nats times beta
    reward_accuracy: float | None = None  # share of pairs whose chosen answer is the better one


Event = Stage | Started | Step | Evaluated
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listens to nothing."""
