"""`ah merge`: several adapters of one base made into one that can be published, or into a model."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from adapterhub.cli.export import Source, find_source, print_summary
from adapterhub.cli.output import BaseOption, JsonOption, RegistryOption, SignedByOption, print_json
from adapterhub.errors import BaseMismatch, UsageError
from adapterhub.manifest import BaseFingerprint, Lineage
from adapterhub.registry.signing import Signers
from adapterhub.runrecord import ADAPTER, RunRecord
from adapterhub.settings import load_settings

if TYPE_CHECKING:
    from adapterhub.export import ExportResult
    from adapterhub.export.combine import Combined, Part, Recipe


def merge(
    what: Annotated[
        list[str],
        typer.Argument(metavar="REF|DIR[:WEIGHT]...", help="Two adapters or more; the weight is 1 unless told."),
    ],
    to: Annotated[
        Path,
        typer.Option("--to", metavar="DIR", help="A new folder: an adapter for ah publish, with --merged a model."),
    ],
    method: Annotated[
        Literal["cat", "svd", "ties", "dare_ties", "dare_linear", "magnitude_prune"],
        typer.Option(
            "--method", help="cat: exact, the ranks add up. svd: the nearest of --rank. Others: pruned first."
        ),
    ] = "cat",
    rank: Annotated[int | None, typer.Option("--rank", metavar="N", help="Of the result, for all but cat.")] = None,
    density: Annotated[
        float | None, typer.Option("--density", metavar="SHARE", help="Of the values that pruning keeps, up to 1.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of what dare_ties and dare_linear drop.")] = 0,
    merged: Annotated[
        bool, typer.Option("--merged", help="Merge the result into --base, too: a standalone model in --to.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="NAME", help="Of that model: float32, float16, bfloat16; default as the base."),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option("--quantize", metavar="SCHEME", help="That model for vLLM, as in ah export.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", metavar="N", help="Columns under one scale of w4a16; default 128.")
    ] = None,
    base: BaseOption = None,
    require_signed_by: SignedByOption = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add adapters of one base, each with its weight, into a new adapter, or with --merged into a model."""
    settings = load_settings()
    name = base or settings.base
    of_models = {"--dtype": dtype, "--quantize": quantize, "--group-size": group_size}
    given = [flag for flag, value in of_models.items() if value]
    if given and not merged:
        raise UsageError(
            f"{given[0]} is for --merged alone", why="an adapter is float32", hint=f"--merged {given[0]} …"
        )
    if merged and name is None:
        raise UsageError("merging needs the base", why="neither --base nor $AH_BASE names one", hint="add --base BASE")
    signers = Signers.read(require_signed_by or settings.require_signed_by)
    weighted = [split_weight(text) for text in what]
    sources = [find_source(name, settings, registry_url or settings.registry, signers=signers) for name, _ in weighted]
    fingerprint = _base_of(sources, name)

    from adapterhub.export.combine import Part, Recipe, combine

    parents = tuple(s.record.digest for s in sources if s.record)
    lineage = Lineage(method=f"merge-{method}", parents=parents, seed=seed if method.startswith("dare") else None)
    parts = [Part(s.path, weight) for s, (_, weight) in zip(sources, weighted, strict=True)]
    record = RunRecord(base=fingerprint, lineage=lineage)
    recipe = Recipe(method, rank=rank, density=density, seed=seed)
    to = to.expanduser().absolute()
    if merged and name is not None:
        told = [_told(text, source, weight) for (text, weight), source in zip(weighted, sources, strict=True)]
        result, model = _into_model(
            parts,
            to,
            recipe=recipe,
            record=record,
            base=name,
            dtype=dtype,
            quantize=quantize,
            group_size=group_size,
            made_of=told,
        )
    else:
        result, model = combine(parts, to, recipe=recipe, record=record), None
    if as_json:
        told_model = {"model": model.to_json()} if model else {}
        print_json({"path": str(to), "ranks": result.ranks, "errors": result.errors, **told_model})
        return
    typer.echo(str(to))
    module, worst = max(result.errors.items(), key=lambda item: item[1])
    typer.echo(f"{len(result.ranks)} modules; largest relative error {worst:.2g} ({module})", err=True)
    if model:
        print_summary(model)


def _into_model(
    parts: Sequence[Part],
    to: Path,
    *,
    recipe: Recipe,
    record: RunRecord,
    base: str,
    dtype: str | None,
    quantize: str | None,
    group_size: int | None,
    made_of: Sequence[str],
) -> tuple[Combined, ExportResult]:
    """The adapter is made in a folder of its own, and exported as any other."""
    from adapterhub.base import find_base
    from adapterhub.export import export_model
    from adapterhub.export.combine import combine
    from adapterhub.export.plainlora import refuse_taken
    from adapterhub.export.quantisable import choose_scheme

    refuse_taken(to)
    model = find_base(base)
    model.check(record.base, what=" + ".join(made_of))
    choose_scheme(model, quantize, group_size)  # refused before anything is added up
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as folder:
        result = combine(parts, Path(folder) / "sum", recipe=recipe, record=record)
        exported = export_model(
            result.path / ADAPTER,
            model,
            to,
            dtype=dtype,
            quantize=quantize,
            group_size=group_size,
            recorded=record.base,
            made_of=made_of,
        )
    return result, exported


def _told(text: str, source: Source, weight: float) -> str:
    """For people: ``0.7 acme/support@3``."""
    name = str(source.record.ref) if source.record else Path(text).name
    return f"{weight:g} {name}"


def split_weight(text: str) -> tuple[str, float]:
    """``acme/a@1:0.7`` → name and weight; a digest's colon is none of a weight."""
    found = re.fullmatch(r"(.+?):(-?\d{1,9}(?:\.\d{1,9})?)", text)
    return (found[1], float(found[2])) if found else (text, 1.0)


def _base_of(sources: list[Source], name: str | None) -> BaseFingerprint:
    known = [s.recorded for s in sources if s.recorded is not None]
    for other in known[1:]:
        if known[0].match(other) == "mismatch":
            raise BaseMismatch(
                "the adapters were trained on different bases", why=f"one on {known[0].name}, one on {other.name}"
            )
    if len(known) == len(sources):
        return known[0]
    if name is None:
        raise UsageError("merging needs the base model", why="a folder does not say its base", hint="add --base BASE")
    from adapterhub import peftdir
    from adapterhub.base import find_base

    model = find_base(name)
    for source in sources:
        if source.recorded is not None:
            model.check(source.recorded, what=str(source.path))
        model.check_factors(peftdir.read(source.path))
    return model.fingerprint
