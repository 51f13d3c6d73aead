"""`ah merge`: several adapters of one base made into one that can be published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from adapterhub.cli.export import Source, find_source
from adapterhub.cli.output import BaseOption, JsonOption, RegistryOption, SignedByOption, print_json
from adapterhub.errors import BaseMismatch, UsageError
from adapterhub.manifest import BaseFingerprint, Lineage
from adapterhub.registry.signing import Signers
from adapterhub.runrecord import RunRecord
from adapterhub.settings import load_settings


def merge(
    what: Annotated[
        list[str],
        typer.Argument(metavar="REF|DIR[:WEIGHT]...", help="Two adapters or more; the weight is 1 unless told."),
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A new folder, to be published with ah publish.")],
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
    base: BaseOption = None,
    require_signed_by: SignedByOption = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add adapters of one base, each with its weight, into a new adapter."""
    settings = load_settings()
    signers = Signers.read(require_signed_by or settings.require_signed_by)
    weighted = [split_weight(text) for text in what]
    sources = [find_source(name, settings, registry_url or settings.registry, signers=signers) for name, _ in weighted]
    fingerprint = _base_of(sources, base or settings.base)

    from adapterhub.export.combine import Part, Recipe, combine

    parents = tuple(s.record.digest for s in sources if s.record)
    lineage = Lineage(method=f"merge-{method}", parents=parents, seed=seed if method.startswith("dare") else None)
    parts = [Part(s.path, weight) for s, (_, weight) in zip(sources, weighted, strict=True)]
    record = RunRecord(base=fingerprint, lineage=lineage)
    recipe = Recipe(method, rank=rank, density=density, seed=seed)
    result = combine(parts, to.expanduser().absolute(), recipe=recipe, record=record)
    if as_json:
        print_json({"path": str(result.path), "ranks": result.ranks, "errors": result.errors})
        return
    typer.echo(str(result.path))
    module, worst = max(result.errors.items(), key=lambda item: item[1])
    typer.echo(f"{len(result.ranks)} modules; largest relative error {worst:.2g} ({module})", err=True)


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
