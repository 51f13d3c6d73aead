"""How far a quantised model's answers lie from those of the same model without that: through transformers, in float32.

Both models read a few texts, and at every place the two distributions of the next token are compared. Activations are
quantised as compressed-tensors does it, which is not the engine's own kernel, but the same rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adapterhub.errors import MissingDependency, StorageError

TEXTS = (
    "The Treaty of Westphalia ended the Thirty Years' War in 1648. It was signed in two towns,",
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n    return",
    "Customer: My parcel has not arrived, and the tracking page has not changed for a week.\nAgent:",
    "Water boils at a lower temperature on a mountain because",
)
_NEEDED = ("transformers", "compressed_tensors", "accelerate")


@dataclass(frozen=True)
class Divergence:
    """Over all places of all texts."""

    positions: int
    kl_mean: float  # KL(plain ‖ quantised) of the next token, nats
    kl_largest: float
    same_top: float  # share of places where both would say the same next

    def to_json(self) -> dict[str, Any]:
        told = {"kl_mean": self.kl_mean, "kl_largest": self.kl_largest, "same_top": self.same_top}
        return {"positions": self.positions, **{key: round(value, 6) for key, value in told.items()}, "texts": TEXTS}


def require_comparison() -> None:
    """Raises MissingDependency."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"comparing answers needs {', '.join(missing)}",
            hint="pip install 'adapterhub[train]' compressed-tensors, or leave out --kl-divergence",
        )


def compare(plain: Path, quantised: Path) -> Divergence:
    """Two model folders with one tokenizer. Memory: one of them at a time, in float32. Raises StorageError."""
    import torch

    tokens = _tokens(quantised)
    with _quietly():
        expected = _predictions(plain, tokens)
        found = _predictions(quantised, tokens)
    divergences = [(a.exp() * (a - b)).sum(-1) for a, b in zip(expected, found, strict=True)]
    same = [(a.argmax(-1) == b.argmax(-1)).float() for a, b in zip(expected, found, strict=True)]
    every = torch.cat(divergences)
    return Divergence(len(every), float(every.mean()), float(every.max()), float(torch.cat(same).mean()))


def _tokens(folder: Path) -> list[Any]:
    """Each text's tokens, (1, length)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise StorageError(
            "the answers cannot be compared",
            why=f"the model has no tokenizer that can be read ({error})",
            hint="leave out --kl-divergence",
        ) from error
    return [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]


def _predictions(folder: Path, tokens: list[Any]) -> list[Any]:
    """Log-probabilities of the next token, (length, vocabulary), of each text."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

    packed = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return [model(text).logits[0].float().log_softmax(-1) for text in tokens]


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers says in bars and warnings what the caller says in a line."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
