"""`ah train`: a config or flags → a run folder with an adapter in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from adapterhub.cli.output import JsonOption, RegistryOption, out, print_json, print_table, say
from adapterhub.errors import UsageError
from adapterhub.settings import load_settings

if TYPE_CHECKING:
    from adapterhub.trainers import Prepared, Reading, Result
    from adapterhub.trainers.labels.examples import Example
    from adapterhub.trainers.labels.splits import Split
    from adapterhub.trainers.start import FindVersion

Flags = dict[str, tuple[str, Any]]


def train(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG.yml", help="Axolotl's keys; flags win.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="DIR|HUB_ID", help="The model to adapt; default $AH_BASE.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE", help="Rows: JSONL, JSON, CSV or Parquet; may be repeated."),
    ] = None,
    eval_data: Annotated[
        list[Path] | None, typer.Option("--eval-data", metavar="FILE", help="Rows for the evaluation loss.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="TENANT/ADAPTER", help="What it will be published as.")
    ] = None,
    task: Annotated[
        Literal["style", "domain", "reasoning", "full"] | None,
        typer.Option("--task", help="What it shall learn; sets the rank: 8, 16, 64, 128."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="RUN|DIR|TENANT/ADAPTER[@VERSION]", help="Go on from this adapter."),
    ] = None,
    folder: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder; default runs/….")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="LoRA rank.")] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="LoRA alpha; 32 suits every rank.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Times through the data.")] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Optimizer steps; wins over --epochs.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate; default by the base's width.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Rows a step.")] = None,
    sequence_len: Annotated[int | None, typer.Option("--sequence-len", help="Tokens a row at most.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Same seed, same machine: same bytes.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Print what becomes of each key, and stop.")] = False,
    show_labels: Annotated[
        int,
        typer.Option("--show-labels", metavar="N", min=0, help="Print N rows with their trained tokens marked."),
    ] = 0,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="Go on with a run that was broken off.")
    ] = None,
    auto_batch: Annotated[
        bool,
        typer.Option("--auto-batch", help="Out of memory: go on with half the micro batch and twice the accumulation."),
    ] = False,
    skip_bad_rows: Annotated[
        int | None, typer.Option("--skip-bad-rows", metavar="N", help="Leave out up to N bad rows, and name them.")
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option("--num-processes", metavar="N", help="Train in N processes, one a GPU; each takes --batch rows."),
    ] = None,
    allow_unknown_keys: Annotated[
        bool, typer.Option("--allow-unknown-keys", help="Note unknown keys instead of refusing them.")
    ] = False,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA adapter on chat rows, on text, or on preferences."""
    # Before torch is imported: its threads wait for each other by spinning, so on cores that another job also uses
    # 80 tokens/s became 3 (two cores, measured in one run). Asleep they leave the core to whom they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    flags: Flags = {
        key: (flag, value)
        for key, flag, value in (
            ("base_model", "--base", base),
            ("datasets", "--data", _sources(data)),
            ("test_datasets", "--eval-data", _sources(eval_data)),
            ("adapterhub.name", "--name", name),
            ("adapterhub.task", "--task", task),
            ("adapterhub.skip_bad_rows", "--skip-bad-rows", skip_bad_rows),
            ("adapterhub.num_processes", "--num-processes", num_processes),
            ("output_dir", "--out", str(folder) if folder else None),
            ("lora_model_dir", "--from", start),
            ("lora_r", "--rank", rank),
            ("lora_alpha", "--alpha", alpha),
            ("num_epochs", "--epochs", epochs),
            ("max_steps", "--max-steps", max_steps),
            ("learning_rate", "--lr", lr),
            ("micro_batch_size", "--batch", batch),
            ("sequence_len", "--sequence-len", sequence_len),
            ("seed", "--seed", seed),
        )
        if value is not None
    }
    if resume is not None:
        if flags or config or check or show_labels or auto_batch:
            raise UsageError("--resume takes no config and no other flags", why="a run goes on as it began")
        _finish(_resumed(resume, registry_url), as_json=as_json)
        return
    reading = _read(config, flags, allow_unknown_keys=allow_unknown_keys)
    if registry_url is not None and reading.config.lora_model_dir is None:
        raise UsageError("--registry is where --from looks", hint="add --from acme/support@3, or leave --registry out")
    if check:
        _print_check(reading, config, as_json=as_json)
        return
    prepared = _prepare(reading, config, flags, registry_url)
    if show_labels:
        _say_prepared(prepared)
        _print_labels(prepared, show_labels, as_json=as_json)
        return
    _finish(_trained(reading, prepared, auto_batch=auto_batch), as_json=as_json)


def _sources(paths: list[Path] | None) -> list[dict[str, str]] | None:
    return [{"path": str(path)} for path in paths] if paths else None


def _read(config: Path | None, flags: Flags, *, allow_unknown_keys: bool) -> Reading:
    from adapterhub.trainers import YamlFile, read_config, read_yaml

    if config is None and not flags:
        raise UsageError(
            "nothing to train",
            why="neither a config nor flags are given",
            hint="ah train config.yml, or: ah train --base DIR|HUB_ID --data train.jsonl --name acme/support",
        )
    file = read_yaml(config) if config else YamlFile(source="the command", values={})
    default = load_settings().base
    if default and "base_model" not in flags and not file.values.get("base_model"):
        flags["base_model"] = ("AH_BASE", default)
    return read_config(file, flags=flags, allow_unknown_keys=allow_unknown_keys)


def _prepare(reading: Reading, config: Path | None, flags: Flags, registry_url: str | None) -> Prepared:
    from adapterhub.trainers import prepare, run_folder

    if reading.config.output_dir:
        run_folder(reading.config)  # taken? better said before the data is read
    beside = config.parent if config else None
    near = {key: None if key in flags else beside for key in ("datasets", "test_datasets", "lora_model_dir")}
    return prepare(reading.config, beside={**near, "config": beside}, find_version=version_finder(registry_url))


def version_finder(registry_url: str | None) -> FindVersion:
    """Finds a version to go on from: its files, fetched and verified, named by its digest."""
    from adapterhub.refs import AdapterRef
    from adapterhub.registry import Cache, open_registry
    from adapterhub.trainers.start import Start

    def find(name: str) -> Start:
        settings = load_settings()
        registry = open_registry(registry_url or settings.registry)
        record = registry.resolve(AdapterRef.parse(name)).record
        path = Cache(settings.cache, registry).fetch(record)
        return Start(f"{record.name}@{record.digest}", path, record.manifest.base)

    return find


def _trained(reading: Reading, prepared: Prepared, *, auto_batch: bool) -> Result:
    from adapterhub.cli.progress import shown
    from adapterhub.trainers import train as start

    _say_fates(reading)
    _say_prepared(prepared)
    with shown() as listener:
        return start(reading, prepared, on_event=listener, auto_batch=auto_batch)


def _resumed(folder: Path, registry_url: str | None) -> Result:
    from adapterhub.cli.progress import shown
    from adapterhub.trainers import read_run
    from adapterhub.trainers import resume as go_on

    prepared = read_run(folder, find_version=version_finder(registry_url))
    _say_prepared(prepared)
    with shown() as listener:
        return go_on(folder, prepared, on_event=listener)


# ── what is printed ──────────────────────────────────────────────────────────────────────────────────────────


def _print_check(reading: Reading, source: Path | None, *, as_json: bool) -> None:
    from rich.markup import escape

    from adapterhub.trainers.presence import absent

    missing = absent(reading.config, source.parent if source else None)
    if as_json:
        fates = [_fate(fate) for fate in reading.fates]
        print_json({"keys": fates, "absent": missing, "resolved": reading.config.to_yaml()})
        return
    # A place in the config is its line and column; what else there is, is a flag.
    places = [f.where.removeprefix(f"{source}:") for f in reading.fates]
    rows = [(f.key, f.kind, f.note, place) for f, place in zip(reading.fates, places, strict=True)]
    print_table(("key", "", "", "where"), rows)
    for what in missing:
        say(f"[yellow]not here, so not checked:[/] {escape(what)}")
    say("[dim]the rows and the base are not looked into: ah train --show-labels 3 does both[/]")


def _fate(fate: Any) -> Mapping[str, str]:
    return {"key": fate.key, "fate": fate.kind, "note": fate.note, "where": fate.where}


def _say_fates(reading: Reading) -> None:
    """Honoured keys on one line; the others each with what became of them."""
    from rich.markup import escape

    honoured = [f.key for f in reading.fates if f.kind == "honoured"]
    if honoured:
        say(f"[dim]honoured:[/] {escape(', '.join(honoured))}")
    for fate in reading.fates:
        if fate.kind != "honoured":
            say(f"[yellow]{fate.kind}:[/] {escape(fate.key)}: {escape(fate.note)} [dim]({escape(fate.where)})[/]")


def _say_prepared(prepared: Prepared) -> None:
    from rich.markup import escape

    config, split = prepared.config, prepared.train
    for file in split.files:
        told = ", told from the rows" if file.detected else ""
        say(f"data: {escape(str(file.path))}, {len(file.rows):,} rows of {file.format}{told}")
        if file.unused:
            say(f"[yellow]not used:[/] the columns {escape(', '.join(file.unused[:8]))} of {escape(file.path.name)}")
        if file.duplicates:
            say(f"[yellow]duplicates:[/] {file.duplicates:,} rows of {escape(file.path.name)} are there already")
        for skipped in file.skipped[:5]:
            say(f"[yellow]skipped:[/] {escape(skipped)}")
        if len(file.skipped) > 5:
            say(f"[yellow]skipped:[/] {len(file.skipped) - 5:,} more bad rows, listed in the run's data.json")
    held = f"; {prepared.evaluation.rows:,} rows to evaluate" if prepared.evaluation else ""
    judged = f" ({sum(split.good):,} good)" if split.good else ""
    say(f"rows: {split.rows:,}{judged} with {split.tokens:,} tokens, {split.trained_tokens:,} trained on{held}")
    if split.dropped:
        say(
            f"[yellow]dropped:[/] {len(split.dropped)} rows longer than sequence_len {config.sequence_len}, "
            f"first {escape(split.dropped[0])}"
        )
    if split.truncated:
        say(f"[yellow]cut:[/] {split.truncated} rows at sequence_len {config.sequence_len}; they lose their ends")
    if prepared.start is not None:
        say(f"going on from {escape(prepared.start.name)}")
    say(
        f"adapter: rank {config.lora_r}, alpha {config.lora_alpha:g}, {prepared.lora_parameters:,} parameters; "
        f"learning rate {config.learning_rate:g}"
    )
    for advice in prepared.advice:
        say(f"[yellow]advice:[/] {escape(advice)}")


def _print_labels(prepared: Prepared, count: int, *, as_json: bool) -> None:
    from rich.text import Text

    from adapterhub.trainers.labels.labels import coloured

    shown = [(e, told, coloured(e, prepared.tokenizer)) for e, told in _first_rows(prepared.train, count)]
    if as_json:
        rows = [(e, told, [{"text": text, "trained": trained} for text, trained in p]) for e, told, p in shown]
        print_json([{"where": e.where, "pieces": p} | ({"answer": told} if told else {}) for e, told, p in rows])
        return
    plain = not out().is_terminal
    for example, told, pieces in shown:
        text = Text()
        for piece, trained in pieces:
            marked = f"⟦{piece}⟧" if plain and trained else piece
            text.append(marked, style="bold green" if trained else "dim")
        answer = f", {told}" if told else ""
        out().print(
            f"[bold]{example.where}[/]{answer}  {example.trained} of {len(example.input_ids)} tokens trained on"
        )
        out().print(text)
        out().print()


def _first_rows(split: Split, count: int) -> list[tuple[Example, str]]:
    """Each answer of the first rows; of preferences with what is held of it."""
    examples = split.examples[: 2 * count if split.pairs else count]
    if split.pairs:
        return [(example, ("chosen", "rejected")[i % 2]) for i, example in enumerate(examples)]
    if split.good:
        return [(e, "good" if good else "bad") for e, good in zip(examples, split.good[:count], strict=True)]
    return [(example, "") for example in examples]


def _finish(result: Result, *, as_json: bool) -> None:
    from rich.markup import escape

    fitted, record = result.fitted, result.record
    if as_json:
        print_json(result.to_json())
        return
    final = f"evaluation loss {fitted.eval_loss:.4f}" if fitted.eval_loss is not None else "no evaluation data"
    if "eval_reward_margin" in fitted.evaluation:
        final += f", reward margin {fitted.evaluation['eval_reward_margin']:.3f}"
    if "eval_reward_accuracy" in fitted.evaluation:
        final += f", chosen before rejected in {fitted.evaluation['eval_reward_accuracy']:.1%}"
    speed = fitted.tokens / max(fitted.seconds, 1e-9)
    say(f"[bold green]trained[/] {fitted.steps} steps in {fitted.seconds:.1f} s ({speed:.0f} tokens/s); {final}")
    say(f"report: {escape(str(result.folder / 'report.html'))}")
    named = ("" if record.name else " --name acme/support") + (" --for export" if result.dora else "")
    say(f"run:    {escape(str(result.folder))}")
    say(f"next:   ah publish {escape(str(result.folder))}{named}")
