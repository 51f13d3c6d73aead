"""What a key may hold: each reader takes a YAML value to what `TrainConfig` holds, or says what it expects."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal

from adapterhub.peftdir import VLLM_MAX_RANK

Reader = Callable[[Any], Any]  # raises ValueError("expects …")


def whole(low: int = 0, high: int | None = None) -> Reader:
    def read(value: Any) -> int:
        expected = f"a whole number from {low}" + (f" to {high}" if high is not None else "")
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise ValueError(f"expects {expected}")
        return value

    return read


def number(low: float = 0.0, high: float = math.inf, *, above: bool = False) -> Reader:
    """Also reads 2e-4, which YAML 1.1 takes for text. ``above``: ``low`` itself is out."""

    def read(value: Any) -> float:
        try:
            result = float(value) if not isinstance(value, bool) and isinstance(value, int | float | str) else math.nan
        except ValueError:
            result = math.nan
        if not (low < result if above else low <= result) or not result <= high or math.isinf(result):
            bound = f" {'above' if above else 'from'} {low:g}" + (f" to {high:g}" if high != math.inf else "")
            raise ValueError(f"expects a number{bound}")
        return result

    return read


def numbers(value: Any) -> tuple[float, ...]:
    """One number or a list of them."""
    found = value if isinstance(value, list) else [value]
    return tuple(number()(v) for v in found)


LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft",
)  # fmt: skip


def losses(value: Any) -> tuple[str, ...]:
    """One of TRL's losses for pairs, or a list of them."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(name in LOSSES for name in found):
        raise ValueError("expects some of " + ", ".join(LOSSES))
    return tuple(dict.fromkeys(found))


def initial(value: Any) -> bool | str:
    """How A and B begin; ``pissa_niter_16`` is PiSSA with so many rounds of a quick decomposition."""
    if isinstance(value, bool) or value in ("gaussian", "orthogonal", "pissa", "olora"):
        return bool(value) if isinstance(value, bool) else str(value)
    if isinstance(value, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", value):
        return value
    raise ValueError("expects true, gaussian, orthogonal, pissa, pissa_niter_N or olora")


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expects text")
    return value


def paths(value: Any) -> tuple[str, ...]:
    """One path or a list of them."""
    found = texts(value)
    return (found,) if isinstance(found, str) else found


def words(value: Any) -> str:
    """Text that may be empty."""
    if not isinstance(value, str):
        raise ValueError("expects text")
    return value


def roles(value: Any) -> tuple[str, ...]:
    """Roles of messages; none at all where each message says itself whether it is trained on."""
    known = ("system", "developer", "user", "assistant", "tool")
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or any(role not in known for role in found):
        raise ValueError("expects a list of " + ", ".join(known))
    return tuple(found)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expects true or false")
    return value


def choice(*allowed: Any) -> Reader:
    def read(value: Any) -> Any:
        if value not in allowed:
            raise ValueError("expects one of " + ", ".join(str(a).lower() for a in allowed))
        return value

    return read


def texts(value: Any) -> tuple[str, ...] | str:
    """A list of names, or one regular expression."""
    if isinstance(value, str):
        return text(value)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
        raise ValueError("expects a list of names")
    return tuple(value)


def names(value: Any) -> dict[str, str]:
    """Text to text; numbers and truth values are taken as they are spelt."""
    if not isinstance(value, dict) or not all(isinstance(v, str | int | float) for v in value.values()):
        raise ValueError("expects lines like `team: support`")
    return {str(k): str(v).lower() if isinstance(v, bool) else str(v) for k, v in value.items()}


def ranks(value: Any) -> dict[str, int]:
    """Module name or regular expression → rank."""
    return _pattern(value, whole(1, VLLM_MAX_RANK))


def alphas(value: Any) -> dict[str, float]:
    """Module name or regular expression → alpha."""
    return _pattern(value, number(above=True))


def _pattern(value: Any, reader: Reader) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise ValueError("expects lines like `q_proj: 8`")
    for key in value:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"expects module names or regular expressions: {key!a}: {error}") from error
    return {key: reader(found) for key, found in value.items()}


def layers(value: Any) -> tuple[int, ...]:
    """Indices of decoder layers, from 0."""
    found = value if isinstance(value, list) else [value]
    if not found or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in found):
        raise ValueError("expects a list of layer indices from 0")
    return tuple(sorted(set(found)))


def options(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("expects a mapping")
    return dict(value)


def precision(value: Any) -> bool | Literal["auto"]:
    if value not in (True, False, "auto", "full"):
        raise ValueError("expects true, false or auto")
    return "auto" if value == "auto" else bool(value)


def strategy(value: Any) -> str:
    """``no`` is false in YAML."""
    if value is False:
        return "no"
    if value not in ("no", "steps", "epoch", "best"):
        raise ValueError("expects no, steps or epoch")
    if value == "best":
        raise ValueError("best is not in this version; expects no, steps or epoch")
    return str(value)


TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def trackers(value: Any) -> tuple[str, ...]:
    """One tracker or a list of them; ``none`` is none."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(name in (*TRACKERS, "none") for name in names):
        raise ValueError("expects none, or some of " + ", ".join(TRACKERS))
    return tuple(dict.fromkeys(name for name in names if name != "none"))
