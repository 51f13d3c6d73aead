"""Initial values that change the base (PiSSA, OLoRA), and the way back to a plain LoRA.

Such an adapter is trained on W − s·B₀A₀. What serves has W, so the difference goes into the adapter: s·BA − s·B₀A₀ is
a LoRA of twice the rank (PiSSA, arXiv:2404.02948, appendix C).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from adapterhub.errors import RunFailed
from adapterhub.peftdir import WEIGHTS

INITIAL = "initial"  # in the run's folder: A₀ and B₀


def keep_initial(model: Any, folder: Path, *, resumed: bool) -> None:
    """Save A₀ and B₀ before the first step.

    Raises RunFailed where a run that goes on began with other ones, for then its base would be another.
    """
    target = folder / INITIAL
    unfinished = folder / (INITIAL + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(str(unfinished), selected_adapters=["default"])
    if resumed and (target / WEIGHTS).is_file():
        same = (target / WEIGHTS).read_bytes() == (unfinished / WEIGHTS).read_bytes()
        shutil.rmtree(unfinished)
        if not same:
            raise RunFailed(
                f"the run {folder} cannot go on here",
                why="its initial values come out otherwise on this machine, so the base would be another",
                hint="go on where it began, or start again",
            )
        return
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)


def save_converted(model: Any, destination: Path, folder: Path) -> None:
    """Save the adapter as a plain LoRA for the untouched base."""
    model.save_pretrained(
        str(destination),
        selected_adapters=["default"],
        path_initial_model_for_weight_conversion=str((folder / INITIAL).absolute()),
    )
