"""Which tensors of a base may be quantised: the linear layers inside the decoder. Embedding, head and norms stay."""

from __future__ import annotations

import re
from collections.abc import Iterable

from adapterhub.base import BaseModel
from adapterhub.errors import Unsupported, UsageError
from adapterhub.export.layout import WIDTH
from adapterhub.export.packing import FLOAT8, quantisation
from adapterhub.export.schemes import GROUPS, Scheme, find_scheme
from adapterhub.export.tuned import FAMILIES
from adapterhub.peftdir import Tensor

_LAYER = re.compile(r"(?:.*\.)?layers\.\d+\..*_proj\.weight")


def choose_scheme(base: BaseModel, name: str | None, group: int | None) -> Scheme | None:
    """What ``--quantize`` and ``--group-size`` say of this base. Raises UsageError, Unsupported."""
    if name is not None:
        scheme = find_scheme(name, group)
        _check_quantisable(base, scheme)
        return scheme
    if group is not None:
        raise UsageError("--group-size is for --quantize alone", hint="--quantize w4a16 --group-size 64")
    return None


def _check_quantisable(base: BaseModel, scheme: Scheme) -> None:
    kind = base.config.get("model_type")
    if method := quantisation(base.config) or ("float8" if _float8(base) else ""):
        raise Unsupported(
            f"the base {base.name} is quantised already ({method})",
            why="what one rounding lost, a second one would build on",
            hint="name the original, unquantised model with --base",
        )
    if kind not in FAMILIES:
        raise Unsupported(
            f"a {kind} model cannot be quantised here",
            why=f"which of its layers may be is known of {', '.join(sorted(FAMILIES))}",
            hint="export it without --quantize, and quantise the result with llm-compressor",
        )
    layers = [tensor for _, tensor in base.tensors.values() if is_linear(tensor)]
    odd = next((tensor for tensor in layers if tensor.dtype not in WIDTH), None)
    if odd or not layers:
        raise Unsupported(
            f"the base {base.name} cannot be quantised",
            why=f"{odd.name} is stored as {odd.dtype}" if odd else "it has no linear layer that is known here",
        )
    _check_groups(base, scheme)


def is_linear(tensor: Tensor) -> bool:
    """Whether it is the weight of a linear layer inside the decoder, in the families that are known."""
    return len(tensor.shape) == 2 and _LAYER.fullmatch(tensor.name) is not None


def ignored(head: str, quantised: Iterable[str], names: Iterable[str]) -> list[str]:
    """The linear layers that stay: the head, whether it is stored or tied, and any other projection."""
    rest = set(names) - set(quantised)
    others = sorted(name.removesuffix(".weight") for name in rest if name.endswith("_proj.weight"))
    return [head, *others]


def _check_groups(base: BaseModel, scheme: Scheme) -> None:
    if not scheme.group:
        return
    columns = {t.shape[1]: t.name for _, t in base.tensors.values() if is_linear(t)}
    odd = next((n for n in sorted(columns) if n % scheme.group), None)
    if odd is None:
        return
    fits = next((group for group in GROUPS if not any(n % group for n in columns)), None)
    raise Unsupported(
        f"the base {base.name} cannot be quantised in groups of {scheme.group}",
        why=f"{columns[odd]} has {odd} columns",
        hint=f"--quantize {scheme.name} --group-size {fits}" if fits else "--quantize w8a8 has one scale a row",
    )


def _float8(base: BaseModel) -> bool:
    return any(tensor.dtype in FLOAT8 for _, tensor in base.tensors.values())
