"""Starts the engine, waits until it is ready, and stops it with nothing left behind.

    with Engine(ServeOptions(base="…", registry="file:///…", cache=path, port=0)) as server:
        client = openai.OpenAI(base_url=server.base_url, api_key="none")

An `Engine` is one vLLM server: API server, engine core and worker in a session of their own under a guard
(`guard.py`). Its output goes to a log file; `say` gets the lines that a person wants to see.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import util
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

import httpx

from adapterhub.base import BaseModel, find_base
from adapterhub.errors import EngineError, UsageError
from adapterhub.registry.base import Registry
from adapterhub.serving import arguments
from adapterhub.serving.adapters.prefetch import Prefetch, prefetching
from adapterhub.serving.arguments import Holding, ServeOptions
from adapterhub.serving.config import ServeConfig
from adapterhub.serving.engine import guard
from adapterhub.serving.engine.log import cause, telling
from adapterhub.serving.engine.machine import available_memory, check_port, cpu_flags, engine_build
from adapterhub.serving.rollout.promptset import check_folder
from adapterhub.serving.rollout.webhook import check_url
from adapterhub.serving.telemetry import tracing
from adapterhub.serving.tenants.keys import Directory

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_GIB = 2**30
# The engine is started by name and not as `vllm serve`: the CPU build carries another distribution's name, and there
# the command fails. With -c no spawned process imports the HTTP server again, as it would with -m.
_ENTRY = "from adapterhub.serving.engine.entry import main; main()"
_LOOK_SECONDS = 1.0  # between looks at an engine that runs


@dataclass(frozen=True)
class Launch:
    """Everything that starts one engine, and what to tell about it."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    host: str
    port: int
    log: Path
    ready_path: str = "/ready"
    notes: tuple[str, ...] = ()  # lines for people
    example: str = arguments.BASE_NAME  # a model to try
    needs_keys: bool = False
    hang_seconds: float = 0.0  # without an answer after which it hangs; 0: never
    prefetch: Prefetch | None = None  # what is done while it starts

    @property
    def url(self) -> str:
        """``http://127.0.0.1:8000``, from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


class Engine:
    """A running server. As a context manager it starts on entry, ready to answer, and stops on exit."""

    def __init__(
        self,
        options: ServeOptions | Launch,
        *,
        say: Callable[[str], None] = lambda line: None,
        start_seconds: float = 600.0,
        grace_seconds: float = 20.0,
    ) -> None:
        """``grace_seconds``: what a stop gives the engine before it is killed."""
        self._options: ServeOptions | Launch = options
        self._starts = 0
        self._say = say
        self._start_seconds = start_seconds
        self._grace_seconds = grace_seconds
        self._guard: subprocess.Popen[bytes] | None = None
        self._pipe = -1
        self._output: BinaryIO  # the log, kept open: it lies in the cache, which may be deleted at any time

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return self.launch.url

    @property
    def base_url(self) -> str:
        """What an OpenAI client wants."""
        return f"{self.launch.url}/v1"

    @property
    def log(self) -> Path:
        return self.launch.log

    def processes(self) -> list[int]:
        """Every living process of the engine, the guard included."""
        return guard.session_processes(self._guard.pid) if self._guard else []

    def start(self) -> None:
        """Start and wait until requests are answered; after a `stop` again, as it was, with a log of its own.

        Raises:
            UsageError, NotFound, MissingDependency: before anything is loaded.
            EngineError: the engine ended, or was not ready within ``start_seconds``. Nothing is left running.
        """
        if self._starts == 0:
            self.prepare()
        self._starts += 1
        if self._starts > 1:
            log = self._plan.log
            self.launch = replace(self._plan, log=log.with_name(f"{log.stem}-{self._starts}{log.suffix}"))
        self._spawn()
        try:
            with self.launch.prefetch or contextlib.nullcontext():
                self._wait_ready()
        except BaseException:  # also Ctrl-C: no engine is left behind
            self.stop()
            raise

    def prepare(self) -> Launch:
        """Check all that can be checked, and decide on the port, before anything is loaded. Raises like `start`."""
        if isinstance(self._options, ServeOptions):
            self._options = prepare(self._options)
            for note in self._options.notes:
                self._say(note)
        self.launch = self._plan = self._options
        return self.launch

    def drain(self, seconds: float) -> bool:
        """Take no new requests, and wait until those that run are over; False where ``seconds`` were not enough.

        The engine is not ready at once, and ends by itself when it is done; `stop` ends it in any case.
        """
        if self._guard is None or seconds <= 0:
            return False
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, guard.DRAIN)
        try:
            self._guard.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """Let the engine finish, for at most ``grace_seconds``; then end every process of it. May be called twice."""
        if self._guard is None:
            return
        with contextlib.suppress(BrokenPipeError):  # the guard is gone
            os.write(self._pipe, guard.STOP)  # and not only closed: a forked child of this process may hold it open too
        os.close(self._pipe)
        try:
            self._guard.wait(self._grace_seconds + 10)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        finally:
            guard.end_session(self._guard.pid)
            self._guard = None
            self._output.close()

    def wait(self) -> None:
        """Show what matters of the log until the engine ends by itself, or hangs.

        Raises EngineError then, whatever its code.
        """
        assert self._guard is not None, "the engine was not started"
        hang, heard = self.launch.hang_seconds, time.monotonic()
        with httpx.Client(base_url=self.launch.url, timeout=min(30, hang or 30), trust_env=False) as client:
            while self._guard.poll() is None:
                health = _health(client)
                self._show()
                if health == "ended":
                    break
                if health != "silent":
                    heard = time.monotonic()
                if health == "hangs" or (hang and time.monotonic() - heard >= hang):
                    what = "finished a step" if health == "hangs" else "answered"
                    raise EngineError(
                        "the engine hangs", why=f"it has not {what} for {hang:.0f} s", hint=f"less {self.launch.log}"
                    )
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._guard.wait(_LOOK_SECONDS)
        raise self._crash("the engine ended by itself")

    def _spawn(self) -> None:
        self.launch.log.parent.mkdir(parents=True, exist_ok=True)
        read_end, self._pipe = os.pipe()
        with self.launch.log.open("wb") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-S", guard.__file__, str(read_end), str(self._grace_seconds), *self.launch.command],
                env=dict(self.launch.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[read_end],
                start_new_session=True,
            )
        self._output = self.launch.log.open("rb")
        os.close(read_end)

    def _wait_ready(self) -> None:
        assert self._guard is not None, "called by start only"
        deadline = time.monotonic() + self._start_seconds
        with httpx.Client(base_url=self.launch.url, timeout=30, trust_env=False) as client:
            while time.monotonic() < deadline:
                self._show()
                if self._guard.poll() is not None:
                    raise self._crash("the engine did not start")
                if _answers(client, self.launch.ready_path):
                    return
                time.sleep(0.1)
        raise self._crash(f"the engine was not ready within {self._start_seconds:.0f} s")

    def _show(self) -> None:
        """Say the telling lines that the log got since the last look."""
        while line := self._output.readline():
            if not line.endswith(b"\n"):  # the rest is not written yet
                self._output.seek(-len(line), os.SEEK_CUR)
                return
            if told := telling(line.decode(errors="replace").rstrip("\n")):
                self._say(told)

    def _crash(self, what: str) -> EngineError:
        assert self._guard is not None, "it was started"
        code = self._guard.poll()
        ending = "" if code is None else f" (exit code {code})"
        self._output.seek(0)  # the open file: the log may have been deleted with the cache
        lines = self._output.read().decode(errors="replace").splitlines()
        return EngineError(what + ending, why=cause(lines), hint=f"less {self.launch.log}")


def prepare(options: ServeOptions, *, environ: Mapping[str, str] = os.environ) -> Launch:
    """Check everything that can be checked before the engine loads, and decide what was left open.

    Raises:
        UsageError: an owned flag, an address that others reach, a port in use, a rank that no engine takes.
        NotFound: the base is not there. MissingDependency: no vLLM here.
    """
    from adapterhub.registry import open_registry

    arguments.check_vllm_args(options.vllm_args)
    if options.max_lora_rank is not None:
        arguments.check_rank(options.max_lora_rank)
    database = database_of(options)
    if options.redis:
        from adapterhub.serving.tenants.quota import check_redis

        check_redis(options.redis)
    if options.webhook is not None:
        check_url(options.webhook)
    if options.prompts is not None:
        check_folder(options.prompts)
    on_cpu = engine_build() == "cpu"
    base = find_base(options.base)
    port = check_port(options)
    registry = open_registry(options.registry)
    environ = _keeping_bytecode(environ)
    held = holdings(registry, base)
    dtype = arguments.cpu_dtype(cpu_flags()) if on_cpu and options.dtype == "auto" else options.dtype
    log = options.cache / "logs" / f"serve-{port}-{secrets.token_hex(3)}.log"
    rank = options.max_lora_rank or arguments.fitting_rank(held)
    config = ServeConfig(
        registry=options.registry,
        cache=options.cache,
        base=base.path,
        base_name=base.name,
        host=options.host,
        port=port,
        max_loras=options.max_loras,
        max_cpu_loras=arguments.working_set(held, max_loras=options.max_loras, memory=available_memory()),
        max_lora_rank=rank,
        require_signed_by=options.require_signed_by,
        database=database,
        redis=options.redis,
        ledger=options.database if options.usage is not None else None,
        spool=options.usage,
        metrics_adapters=options.metrics_adapters,
        cache_limit=options.cache_limit,
        webhook=options.webhook,
        webhook_secret=options.webhook_secret,
        prompts=options.prompts,
        hang_seconds=options.hang_seconds,
    )
    traces = tracing.endpoint(environ)
    return Launch(
        command=(
            sys.executable,
            "-c",
            _ENTRY,
            *arguments.arguments(options, config, dtype=dtype, on_cpu=on_cpu, traces=traces),
        ),
        environment=arguments.environment(
            environ, config, defaults=_defaults(log, on_cpu=on_cpu, log_json=options.log_json)
        ),
        host=options.host,
        port=port,
        log=log,
        notes=tuple(_notes(options, config, held, dtype)),
        example=held[0].ref if held else arguments.BASE_NAME,
        needs_keys=database is not None,
        hang_seconds=options.hang_seconds,
        prefetch=prefetching(config, registry=registry, base=base.fingerprint),
    )


def _notes(options: ServeOptions, config: ServeConfig, held: Sequence[Holding], dtype: str) -> Iterator[str]:
    yield (
        f"{len(held)} adapter versions for {config.base_name} in {config.registry}: "
        f"max-lora-rank {config.max_lora_rank}{'' if options.max_lora_rank else ' (the smallest from 16 that fits)'}, "
        f"{config.max_loras} in one batch, {config.max_cpu_loras} kept loaded{_kept_why(config, held)}"
    )
    if dtype != options.dtype:
        yield f"dtype {dtype}: bfloat16, in half the memory, would take 8 × the time on this CPU"
    if config.database is None:
        yield "single-user mode: no API keys, reachable from this machine only"
    else:
        from adapterhub.serving.database import masked

        yield f"API keys are needed; tenants and keys are in {masked(config.database)}"


def _kept_why(config: ServeConfig, held: Sequence[Holding]) -> str:
    if config.max_cpu_loras >= len(held):
        return ""
    return " (more would take over a quarter of the memory; the others are loaded when they are asked for)"


def holdings(registry: Registry, base: BaseModel) -> list[Holding]:
    """What the registry holds for this base: its active versions."""
    found = []
    for tenant in registry.tenants():
        for name in registry.adapters(tenant):
            for version in registry.versions(name):
                manifest = version.record.manifest
                fits = manifest.base is None or manifest.base.match(base.fingerprint) != "mismatch"
                if version.status == "active" and fits:
                    found.append(Holding(ref=str(version.record.ref), rank=manifest.lora.rank, size=manifest.size))
    return found


def database_of(options: ServeOptions) -> str | None:
    """The database whose keys the server asks for; None: no keys, and only this machine reaches it.

    Decided once, when it starts: a database that goes away later closes a server, and never opens it.
    Raises UsageError, StorageError.
    """
    is_public = options.host not in LOOPBACK
    if options.keys is False and is_public:
        raise UsageError(
            f"--host {options.host} with --no-keys would let everybody in",
            why="without keys the server listens on this machine only",
            hint="ah serve … --host 127.0.0.1, or without --no-keys",
        )
    directory = None if options.keys is False else _directory(options)
    if (options.keys or is_public) and not (directory and directory.opens):
        raise UsageError(
            f"--host {options.host} needs API keys" if is_public else "there are no API keys",
            why="no tenant has a key that is valid",
            hint="ah tenant create acme, then ah key create acme",
        )
    return options.database if directory and directory.tenants else None


def _directory(options: ServeOptions) -> Directory | None:
    """Of the database, where there is one. Raises StorageError."""
    from adapterhub.serving.database import open_database
    from adapterhub.serving.tenants.tenants import Tenants

    database = open_database(options.database) if options.database else None
    return Tenants(database).directory() if database and database.exists() else None


def _defaults(log: Path, *, on_cpu: bool, log_json: bool) -> dict[str, str]:
    """Environment that yields to the caller's own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    logging = log.with_suffix(".logging.json")
    logging.write_text(json.dumps(arguments.LOGGING_JSON if log_json else arguments.LOGGING))
    defaults = {"VLLM_LOGGING_CONFIG_PATH": str(logging)}
    if on_cpu:
        # vLLM's default is 92 % of the whole machine's memory, and an error where that is not free
        defaults["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, min(32, available_memory() // _GIB // 4)))
    return defaults


def _keeping_bytecode(environ: Mapping[str, str]) -> Mapping[str, str]:
    """Let Python keep what it compiled of vLLM, where the installation did not.

    An installer that compiles nothing, a read-only folder or PYTHONDONTWRITEBYTECODE make each of the engine's
    processes compile torch and vLLM anew: 9 of its 18 s of imports (decision record 0009).
    """
    spec = util.find_spec("vllm")
    assert spec is not None and spec.origin is not None, "engine_build came first"
    if "PYTHONPYCACHEPREFIX" in environ or (Path(spec.origin).parent / "__pycache__").is_dir():
        return environ
    folder = Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "adapterhub" / "bytecode"
    kept = {name: value for name, value in environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(folder)}


def _health(client: httpx.Client) -> Literal["well", "ended", "hangs", "silent"]:
    """What the HTTP server says of the engine behind it; one that is too busy to say it is not dead yet."""
    try:
        answer = client.get("/health")
    except httpx.TransportError:
        return "silent"
    if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
        return "well"
    return "hangs" if b"hangs" in answer.content else "ended"


def _answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
