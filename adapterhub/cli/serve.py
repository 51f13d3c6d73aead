"""`ah serve`: one engine in the foreground, until Ctrl-C."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub.cli.output import BaseOption, BundleOption, RegistryOption, SignedByOption, say
from adapterhub.cli.sizes import parse_size
from adapterhub.errors import UsageError
from adapterhub.registry.signing import Signers
from adapterhub.settings import load_settings

if TYPE_CHECKING:
    from adapterhub.serving.engine.supervisor import Supervisor


class LogFormat(StrEnum):
    """How a server's log is written."""

    text = "text"
    json = "json"


def serve(
    base: BaseOption = None,
    registry: RegistryOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's need keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    max_loras: Annotated[int, typer.Option(min=1, max=256, help="Adapters in one batch.")] = 4,
    max_lora_rank: Annotated[
        int | None, typer.Option(help="Largest rank served; default: the smallest that fits what the registry holds.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; auto looks at the model and the CPU.")
    ] = "auto",
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, help="Longest prompt with answer, in tokens; default: what model and memory allow."),
    ] = None,
    keys: Annotated[
        bool | None,
        typer.Option(
            "--keys/--no-keys",
            help="Whether an API key is needed; default: where there are tenants.",
            show_default=False,
        ),
    ] = None,
    cache_limit: Annotated[
        str | None,
        typer.Option(
            "--cache-limit",
            metavar="SIZE",
            help="Disk for local copies, like 50GB: the ones unused for longest go; default: as much as there is.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FOLDER",
            help="TENANT/ADAPTER.jsonl: prompts by which candidates are scored.",
            show_default=False,
        ),
    ] = None,
    webhook: Annotated[
        str | None,
        typer.Option("--webhook", metavar="URL", help="Is told of swaps and rollouts; signed with $AH_WEBHOOK_SECRET."),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option("--drain-seconds", min=0, help="What a stop gives running requests to finish.")
    ] = 30,
    restarts: Annotated[
        int,
        typer.Option("--restarts", min=0, help="How often in a row an engine that ends by itself is started again."),
    ] = 5,
    hang_seconds: Annotated[
        float,
        typer.Option("--hang-seconds", min=0, help="Without a step, after which an engine hangs and ends; 0: never."),
    ] = 300,
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", help="json: one object a line on stderr, each request among them.")
    ] = LogFormat.text,
    metrics_adapters: Annotated[
        int,
        typer.Option(
            min=0, max=50, help="How many adapters /metrics tells apart; 0: none, their tenants are.", metavar="N"
        ),
    ] = 0,
    require_signed_by: SignedByOption = None,
    bundle: BundleOption = None,
    vllm_flags: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM FLAGS]", help="Handed to vLLM as they are.")
    ] = None,
) -> None:
    """Serve a base model and every adapter of the registry, over the OpenAI API.

    Adapters are loaded when they are first asked for; a channel that moves is followed without a restart.
    Ctrl-C and SIGTERM let running requests finish; a second one ends the server at once.

    Example: ah serve --base Qwen/Qwen3-0.6B -- --enforce-eager
    """
    from rich.markup import escape

    from adapterhub.serving.arguments import ServeOptions
    from adapterhub.serving.database import default_url
    from adapterhub.serving.engine.engine import Engine
    from adapterhub.serving.engine.supervisor import Supervisor

    settings = load_settings()
    signers = Signers.read(path.absolute() for path in require_signed_by or settings.require_signed_by)
    chosen = base or settings.base
    if bundle is not None:
        from adapterhub.cli.bundle import open_bundle

        opened = open_bundle(bundle, settings.home, signers=signers, registry=registry)
        registry = opened.registry
        chosen = base or (str(opened.base) if opened.base else settings.base)
    if not chosen:
        raise UsageError("no base model was named", hint="ah serve --base Qwen/Qwen3-0.6B")
    options = ServeOptions(
        base=chosen,
        registry=registry or settings.registry,
        cache=settings.cache,
        host=host,
        port=port,
        max_loras=max_loras,
        max_lora_rank=max_lora_rank,
        dtype=dtype,
        max_model_len=max_model_len,
        require_signed_by=tuple(key.path for key in signers.keys),
        keys=keys,
        database=settings.database_url or default_url(settings.home),
        redis=settings.redis_url,
        webhook=webhook,
        webhook_secret=settings.webhook_secret or "",
        prompts=prompts.absolute() if prompts else None,
        usage=settings.home / "usage",
        log_json=log_format is LogFormat.json,
        metrics_adapters=metrics_adapters,
        hang_seconds=hang_seconds,
        cache_limit=parse_size(cache_limit, flag="--cache-limit") if cache_limit else None,
        vllm_args=tuple(vllm_flags or ()),
    )
    begun = time.monotonic()

    def tell(line: str) -> None:
        if log_format is LogFormat.json:
            typer.echo(line if line.startswith("{") else _entry(line), err=True)
        else:
            say(f"[dim]{time.monotonic() - begun:5.1f} s[/]  {escape(line)}")

    engine = Engine(options, say=tell)
    supervisor = Supervisor(engine, restarts=restarts, say=tell)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    is_up = False
    try:
        supervisor.start()
        is_up = True
        took = time.monotonic() - begun
        if log_format is LogFormat.json:
            tell(f"ready after {took:.0f} s: {engine.base_url}")
        else:
            say(f"[bold green]ready[/] after {took:.0f} s: {engine.base_url}  (log: {engine.log})")
            say(escape(_curl(engine.base_url, engine.launch.example, with_key=engine.launch.needs_keys)))
        supervisor.run()
    except KeyboardInterrupt:
        if is_up:
            _drain(supervisor, drain_seconds, tell)
    finally:
        engine.stop()
    tell("stopped; no process is left")


def _entry(message: str) -> str:
    """A line of ours among those of a log in JSON."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "level": "INFO", "logger": "adapterhub.cli", "message": message})


def _drain(supervisor: Supervisor, seconds: float, tell: Callable[[str], None]) -> None:
    """Let running requests finish, unless somebody is in a hurry."""
    tell(f"finishing what runs, for at most {seconds:.0f} s; once more to stop at once …")
    try:
        supervisor.drain(seconds)
    except KeyboardInterrupt:
        tell("stopping at once …")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM and a closed terminal end the server as Ctrl-C does."""
    raise KeyboardInterrupt


def _curl(url: str, model: str, *, with_key: bool) -> str:
    """A request to paste."""
    key = ' -H "authorization: Bearer $AH_API_KEY"' if with_key else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return f"curl {url}/chat/completions -H 'content-type: application/json'{key} -d '{body}'"
