"""vLLM's entry points. With `entry`, `resolver`, `selftest` and `cpu_*` the only files that import vllm.

    vllm.general_plugins   register()    in every process: our resolver; on CPU the LoRA product and norms
    vllm.endpoint_plugins  Endpoints()   in the API server: our routes, then the replica behind them

Inert unless ``ADAPTERHUB_SERVE=1``. With it, a server that is not protected does not start: vLLM logs a plug-in that
it could not import and goes on, so what must be in place is looked at from inside (`check_arguments`, `selftest`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.base import BaseModel, find_base
from adapterhub.errors import EngineError, UsageError
from adapterhub.serving.admission.fairness import Window
from adapterhub.serving.arguments import MIDDLEWARE
from adapterhub.serving.config import ServeConfig
from adapterhub.serving.draining import drain
from adapterhub.serving.tenants.access import Access

if TYPE_CHECKING:
    from fastapi import FastAPI

    from adapterhub.serving.replica import Replica
    from adapterhub.serving.telemetry.telemetry import Telemetry

log = logging.getLogger(__name__)

_OPENERS = ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SERVER_DEV_MODE", "VLLM_SKIP_MODEL_NAME_VALIDATION")


def register() -> None:
    """``vllm.general_plugins``: called once or more in every process of the engine."""
    if ServeConfig.from_env() is None:
        return
    from adapterhub.serving.adapters import resolver
    from adapterhub.serving.engine import cpu_lora, cpu_norms

    resolver.register()
    cpu_lora.install()
    cpu_norms.install()


class Endpoints:
    """``vllm.endpoint_plugins``: one in the API server."""

    name = "adapterhub"
    required_tasks = None

    def __init__(self) -> None:
        self._config = ServeConfig.from_env()
        self._app: FastAPI | None = None

    def attach_router(self, app: FastAPI) -> None:
        if self._config is not None:
            from adapterhub.serving import routes

            self._app = app
            routes.attach(app)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Raises EngineError or UsageError where the server would not be protected: then it does not start."""
        if self._config is None:
            return
        if engine_client is None or self._app is None:
            raise EngineError("this server has no engine", why="a render server serves no adapters")
        check_arguments(args, os.environ, has_keys=self._config.database is not None)
        from adapterhub.registry import open_registry
        from adapterhub.serving import gauges, selftest
        from adapterhub.serving.adapters.resolver import VllmEngine, registered
        from adapterhub.serving.bill.account import metered
        from adapterhub.serving.replica import Replica

        base = await asyncio.to_thread(_read_base, self._config.base)
        replica = Replica(
            self._config,
            registry=open_registry(self._config.registry),
            base=base,
            engine=VllmEngine(engine_client, state.openai_serving_models, resolver=registered()),
            window=_window(engine_client.vllm_config, self._config),
            access=_access(self._config),
            app=self._app,
            telemetry=_telemetry(self._config),
        )
        metered(engine_client)
        await replica.access.look()  # a server that cannot tell who asks does not start
        state.adapterhub = replica
        await selftest.check_shield(self._app)
        await selftest.check_meter(engine_client, base=base)
        await selftest.check_batching(engine_client, base=base, config=self._config)
        replica.not_ready = ""
        gauges.connect(replica)
        replica.watch()
        _drain_on_signal(replica, state)
        log.info("ready: %s and the adapters of %s", self._config.base_name, self._config.registry)


def check_arguments(args: Any, environ: Mapping[str, str], *, has_keys: bool = False) -> None:
    """Raises UsageError for a command line or an environment under which tenants are not kept apart."""
    if not has_keys and not _is_loopback(args.host):
        raise UsageError(
            f"the server would listen on {args.host or 'all addresses'} without keys",
            why="whoever reaches it could use every adapter",
            hint="ah serve --host 127.0.0.1",
        )
    for name in _OPENERS:
        if environ.get(name, "0").strip().lower() in ("1", "true"):
            raise UsageError(f"{name} is set", why="it opens ways around the tenancy rules", hint=f"unset {name}")
    if (args.api_server_count or 1) > 1 or args.data_parallel_size > 1:
        raise UsageError("--api-server-count must be 1", why="several would give out the same adapter ids")
    if not args.enable_lora or MIDDLEWARE not in args.middleware:
        raise UsageError(f"--enable-lora and --middleware {MIDDLEWARE} are missing", hint="start it with `ah serve`")


def _window(vllm_config: Any, config: ServeConfig) -> Window:
    """What the engine takes at once, as it has settled it itself."""
    cache = vllm_config.cache_config
    blocks = cache.num_gpu_blocks or 0
    return Window(
        sequences=vllm_config.scheduler_config.max_num_seqs,
        tokens=blocks * cache.block_size or None,
        slots=config.max_loras,
    )


def _drain_on_signal(replica: Replica, state: Any) -> None:
    """SIGUSR1, which `guard` sends, begins a stop; its SIGTERM is vLLM's own affair.

    New connections are the stand-in's at once: vLLM blocks its loop while it shuts down, with whoever waits there.
    """
    draining: list[asyncio.Task[None]] = []  # kept: a task that nobody holds may vanish

    def close(why: str) -> None:
        replica.close(why)
        for listening in state.server.servers:  # uvicorn's; vLLM puts it there
            listening.close()

    async def stop() -> None:
        await drain(replica.under_way, close=close, end=lambda: None)
        await replica.telemetry.close()
        os.kill(os.getpid(), signal.SIGTERM)

    def begin() -> None:
        if not draining:
            draining.append(asyncio.create_task(stop(), name="drain"))

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, begin)


def _access(config: ServeConfig) -> Access:
    if config.database is None:
        return Access()
    from adapterhub.serving.database import open_database
    from adapterhub.serving.tenants.tenants import Tenants

    tenants = Tenants(open_database(config.database))
    return Access(lambda: asyncio.to_thread(tenants.changed))


def _telemetry(config: ServeConfig) -> Telemetry:
    """Raises StorageError where usage would have nowhere to wait."""
    from prometheus_client import REGISTRY

    from adapterhub.serving.bill.ledger import Ledger
    from adapterhub.serving.bill.metering import Metering
    from adapterhub.serving.database import open_database
    from adapterhub.serving.telemetry import tracing
    from adapterhub.serving.telemetry.metrics import Metrics
    from adapterhub.serving.telemetry.telemetry import Telemetry

    metrics = Metrics(REGISTRY, adapters=config.metrics_adapters)
    collector = tracing.endpoint(os.environ)
    traces = tracing.Tracing.to(collector) if collector else None
    if config.ledger is None or config.spool is None:
        return Telemetry(metrics, tracing=traces)
    ledger = Ledger(open_database(config.ledger))
    return Telemetry(metrics, Metering(ledger, config.spool, keyed=config.database is not None), traces)


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "0.0.0.0").is_loopback  # noqa: S104
    except ValueError:  # another name: it may point anywhere
        return False


def _read_base(path: Path) -> BaseModel:
    base = find_base(str(path))
    base.fingerprint  # noqa: B018 - read now, off the event loop; it is kept
    return base
