"""What a key may hold: each reader takes a YAML value to what `TrainConfig` holds, or says what it expects.

The JSON Schema beside each reader says the same to editors (`dialect.schema`).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from adapterhub.peftdir import VLLM_MAX_RANK
from adapterhub.trainers.labels import templates


@dataclass(frozen=True)
class Reader:
    """Reads one value, or raises ValueError("expects …")."""

    read: Callable[[Any], Any]
    schema: Mapping[str, Any]  # JSON Schema of what it takes; null, which unsets a key, is added for all

    def __call__(self, value: Any) -> Any:
        return self.read(value)


_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1}


def reads(**schema: Any) -> Callable[[Callable[[Any], Any]], Reader]:
    """Makes a reader of a function."""
    return lambda function: Reader(function, schema)


def whole(low: int = 0, high: int | None = None) -> Reader:
    def read(value: Any) -> int:
        expected = f"a whole number from {low}" + (f" to {high}" if high is not None else "")
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise ValueError(f"expects {expected}")
        return value

    return Reader(read, {"type": "integer", "minimum": low} | ({} if high is None else {"maximum": high}))


_WRITTEN_NUMBER = r"^[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$"  # YAML 1.1 reads 2e-4 as text


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

    schema: dict[str, Any] = {"type": "number", "exclusiveMinimum" if above else "minimum": low}
    if high != math.inf:
        schema["maximum"] = high
    return Reader(read, {"anyOf": [schema, {"type": "string", "pattern": _WRITTEN_NUMBER}]})


@reads(anyOf=[{"type": "number"}, {"type": "array", "items": {"type": "number"}, "minItems": 1}])
def numbers(value: Any) -> tuple[float, ...]:
    """One number or a list of them."""
    found = value if isinstance(value, list) else [value]
    return tuple(number()(v) for v in found)


LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft",
)  # fmt: skip


@reads(anyOf=[{"enum": list(LOSSES)}, {"type": "array", "items": {"enum": list(LOSSES)}, "minItems": 1}])
def losses(value: Any) -> tuple[str, ...]:
    """One of TRL's losses for pairs, or a list of them."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(name in LOSSES for name in found):
        raise ValueError("expects some of " + ", ".join(LOSSES))
    return tuple(dict.fromkeys(found))


_INITIAL = ("gaussian", "orthogonal", "pissa", "olora")


@reads(anyOf=[{"enum": [True, False, *_INITIAL]}, {"type": "string", "pattern": r"^pissa_niter_[1-9]\d*$"}])
def initial(value: Any) -> bool | str:
    """How A and B begin; ``pissa_niter_16`` is PiSSA with so many rounds of a quick decomposition."""
    if isinstance(value, bool) or value in _INITIAL:
        return bool(value) if isinstance(value, bool) else str(value)
    if isinstance(value, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", value):
        return value
    raise ValueError("expects true, gaussian, orthogonal, pissa, pissa_niter_N or olora")


@reads(type="string", minLength=1)
def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expects text")
    return value


@reads(anyOf=[_TEXT, _TEXTS])
def paths(value: Any) -> tuple[str, ...]:
    """One path or a list of them."""
    found: tuple[str, ...] | str = texts(value)
    return (found,) if isinstance(found, str) else found


@reads(type="string")
def words(value: Any) -> str:
    """Text that may be empty."""
    if not isinstance(value, str):
        raise ValueError("expects text")
    return value


_ROLES = ("system", "developer", "user", "assistant", "tool")


@reads(anyOf=[{"enum": list(_ROLES)}, {"type": "array", "items": {"enum": list(_ROLES)}}])
def roles(value: Any) -> tuple[str, ...]:
    """Roles of messages; none at all where each message says itself whether it is trained on."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or any(role not in _ROLES for role in found):
        raise ValueError("expects a list of " + ", ".join(_ROLES))
    return tuple(found)


@reads(type="boolean")
def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expects true or false")
    return value


def choice(*allowed: Any) -> Reader:
    def read(value: Any) -> Any:
        if value not in allowed:
            raise ValueError("expects one of " + ", ".join(str(a).lower() for a in allowed))
        return value

    return Reader(read, {"enum": list(allowed)})


@reads(anyOf=[_TEXT, _TEXTS])
def texts(value: Any) -> tuple[str, ...] | str:
    """A list of names, or one regular expression."""
    if isinstance(value, str):
        return str(text(value))
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
        raise ValueError("expects a list of names")
    return tuple(value)


@reads(anyOf=[_TEXT, _TEXTS])
def targets(value: Any) -> tuple[str, ...] | str:
    """Names of layers, or one regular expression; ``q_proj, v_proj`` in one text is neither."""
    found: tuple[str, ...] | str = texts(value)
    if isinstance(found, str):
        if "," in found and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", found):
            raise ValueError("expects a list: [" + ", ".join(re.split(r"\s*,\s*", found)) + "]")
        try:
            re.compile(found)
        except re.error as error:
            raise ValueError(f"expects a list of names, or a regular expression: {error}") from error
    return found


@reads(type="object", additionalProperties={"type": ["string", "number", "boolean"]})
def names(value: Any) -> dict[str, str]:
    """Text to text; numbers and truth values are taken as they are spelt."""
    if not isinstance(value, dict) or not all(isinstance(v, str | int | float) for v in value.values()):
        raise ValueError("expects lines like `team: support`")
    return {str(k): str(v).lower() if isinstance(v, bool) else str(v) for k, v in value.items()}


@reads(type="object", additionalProperties={"type": "integer", "minimum": 1, "maximum": VLLM_MAX_RANK})
def ranks(value: Any) -> dict[str, int]:
    """Module name or regular expression → rank."""
    return _pattern(value, whole(1, VLLM_MAX_RANK))


@reads(type="object", additionalProperties={"type": "number", "exclusiveMinimum": 0})
def alphas(value: Any) -> dict[str, float]:
    """Module name or regular expression → alpha."""
    return _pattern(value, number(above=True))


@reads(type="object", additionalProperties={"type": "number", "exclusiveMinimum": 0})
def resources(value: Any) -> dict[str, float]:
    """What a Ray worker gets of each kind."""
    return _pattern(value, number(above=True), example="GPU: 1")


def _pattern(value: Any, reader: Reader, *, example: str = "q_proj: 8") -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise ValueError(f"expects lines like `{example}`")
    for key in value:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"expects module names or regular expressions: {key!a}: {error}") from error
    return {key: reader(found) for key, found in value.items()}


_LAYER = {"type": "integer", "minimum": 0}


@reads(anyOf=[_LAYER, {"type": "array", "items": _LAYER, "minItems": 1}])
def layers(value: Any) -> tuple[int, ...]:
    """Indices of decoder layers, from 0."""
    found = value if isinstance(value, list) else [value]
    if not found or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in found):
        raise ValueError("expects a list of layer indices from 0")
    return tuple(sorted(set(found)))


_TYPES = ("bfloat16", "float16", "float32")


def inner(table: Mapping[str, Reader]) -> Reader:
    """A mapping of known keys, each with its own reader; null unsets there too."""

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError("expects lines like `" + next(iter(table)) + ": …`")
        found = {}
        for key, given in value.items():
            if key not in table:
                raise ValueError(f"holds {key!a}, which it does not have; expects " + ", ".join(table))
            if given is not None:
                try:
                    found[key] = table[key](given)
                except ValueError as error:
                    raise ValueError(f"has {key}, which {error}") from error
        return found

    properties = {key: dict(reader.schema) for key, reader in table.items()}
    return Reader(read, {"type": "object", "properties": properties, "additionalProperties": False})


@reads(type="object")
def options(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("expects a mapping")
    return dict(value)


@reads(enum=[True, False, "auto", "full"])
def precision(value: Any) -> bool | Literal["auto"]:
    if value not in (True, False, "auto", "full"):
        raise ValueError("expects true, false or auto")
    return "auto" if value == "auto" else bool(value)


@reads(enum=[False, "no", "steps", "epoch"])
def strategy(value: Any) -> str:
    """``no`` is false in YAML."""
    if value is False:
        return "no"
    if value not in ("no", "steps", "epoch"):
        raise ValueError("expects no, steps or epoch; the best is kept with load_best_model_at_end")
    return str(value)


_TEMPLATES = [templates.DEFAULT, templates.JINJA, *templates.NAMED, *templates.OWN]


@reads(anyOf=[{"enum": _TEMPLATES}, {"type": "string", "pattern": f"^{templates.FALLBACK}"}])
def template(value: Any) -> str:
    """A template by name; ``tokenizer_default_fallback_chatml`` is ChatML where the tokenizer has none."""
    if not isinstance(value, str) or not templates.known(value):
        close = difflib.get_close_matches(str(value), _TEMPLATES, n=1, cutoff=0.6)
        raise ValueError(
            (f"expects a template's name; did you mean {close[0]}? There are " if close else "expects one of ")
            + ", ".join(_TEMPLATES)
        )
    return value


TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
_TRACKER = [*TRACKERS, "none"]


@reads(anyOf=[{"enum": _TRACKER}, {"type": "array", "items": {"enum": _TRACKER}}])
def trackers(value: Any) -> tuple[str, ...]:
    """One tracker or a list of them; ``none`` is none."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(name in (*TRACKERS, "none") for name in names):
        raise ValueError("expects none, or some of " + ", ".join(TRACKERS))
    return tuple(dict.fromkeys(name for name in names if name != "none"))


quantisation = inner(
    {
        "bnb_4bit_quant_type": choice("nf4", "fp4"),
        "bnb_4bit_use_double_quant": flag,
        "bnb_4bit_compute_dtype": choice(*_TYPES),
        "bnb_4bit_quant_storage": choice(*_TYPES, "uint8"),
        "llm_int8_threshold": number(),
        "llm_int8_skip_modules": texts,
        "llm_int8_has_fp16_weight": flag,
        "llm_int8_enable_fp32_cpu_offload": flag,
    }
)
checkpointing = inner({"use_reentrant": flag})
_SGD = inner({"momentum": number(0, 1), "dampening": number(0, 1), "nesterov": flag})


@reads(anyOf=[_SGD.schema, {"type": "string"}])
def optimiser_options(value: Any) -> dict[str, Any]:
    """Options of SGD, as lines or as ``momentum=0.9,nesterov=true``; the other optimizers have keys of their own."""
    if isinstance(value, str):
        value = dict(part.strip().split("=", 1) for part in value.split(",") if "=" in part)
        value = {key: {"true": True, "false": False}.get(given.lower(), given) for key, given in value.items()}
    found: dict[str, Any] = _SGD(value)
    return found
