"""Settings → the engine's arguments and environment. Pure: reads nothing, starts nothing.

What a person puts behind ``--`` goes to vLLM as it is, except the flags that `ah serve` owns (`OWNED`): each of those
either would open a way around the tenancy rules, or contradict what the registry says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import UsageError
from adapterhub.serving.config import ServeConfig

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # all that vLLM takes for --max-lora-rank
BASE_NAME = "base"
MIDDLEWARE = "adapterhub.serving.middleware.TenancyMiddleware"

_OURS = "it is a flag of `ah serve` itself"
_LORA = "adapters, their slots and their weights are managed from the registry"
_TENANCY = "it would open a way past the rules on who may call what"
_ONE = "one replica is one engine: with several, two processes give out the same adapter ids"
_ORDER = "admission and its order are decided before the engine"

# Flag → why it is refused. Names as vLLM's parser knows them, without dashes in front.
OWNED: Mapping[str, str] = {
    "host": _OURS,
    "port": _OURS,
    "model": "the base is named with --base",
    "served-model-name": f"the base is served under the name {BASE_NAME!r}",
    "dtype": _OURS,
    "max-model-len": _OURS,
    "max-loras": _OURS,
    "max-lora-rank": _OURS,
    "max-cpu-loras": _LORA,
    "enable-lora": _LORA,
    "lora-modules": _LORA,
    "lora-dtype": _LORA,
    "lora-target-modules": _LORA,
    "default-mm-loras": _LORA,
    "fully-sharded-loras": _LORA,
    "enable-tower-connector-lora": _LORA,
    "scheduling-policy": _ORDER,
    "scheduler-cls": _ORDER,
    "middleware": _TENANCY,
    "api-key": "keys belong to tenants and come from AdapterHub",
    "uds": _TENANCY,
    "root-path": _TENANCY,
    "grpc": _TENANCY,
    "grpc-port": _TENANCY,
    "tokens-only": _TENANCY,
    "enable-scale-out": _TENANCY,
    "enable-sleep-mode": _TENANCY,
    "chat-template": "the template comes with the base's folder, or with the adapter",
    "trust-request-chat-template": "the middleware sets each adapter's own template, and takes none from clients",
    "ssl-keyfile": "the engine listens on loopback; TLS ends in front of it",
    "ssl-certfile": "the engine listens on loopback; TLS ends in front of it",
    "config": "a file could set any of the flags that are refused here; write them out",
    "headless": _ONE,
    "api-server-count": _ONE,
    "data-parallel-size": _ONE,
    "data-parallel-size-local": _ONE,
    "data-parallel-rank": _ONE,
    "data-parallel-start-rank": _ONE,
    "data-parallel-hybrid-lb": _ONE,
    "data-parallel-external-lb": _ONE,
    "data-parallel-multi-port-external-lb": _ONE,
}
_SHORT = {"asc": "api-server-count", "dp": "data-parallel-size"}  # and every -dp…

# Python's logging, as vLLM reads it from a file: the engine's lines as they are, ours with their name so that
# `enginelog.telling` knows them. Requests are logged where the format is JSON.
LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "vllm": {
            "class": "vllm.logging_utils.NewLineFormatter",
            "format": "(%(vllm_process_name)s) %(levelname)s %(asctime)s [%(fileinfo)s:%(lineno)d] %(message)s",
        },
        "adapterhub": {"format": "%(levelname)s %(asctime)s %(name)s: %(message)s"},
    },
    "handlers": {
        "vllm": {"class": "logging.StreamHandler", "formatter": "vllm"},
        "adapterhub": {"class": "logging.StreamHandler", "formatter": "adapterhub"},
    },
    "loggers": {
        "vllm": {"handlers": ["vllm"], "level": "INFO", "propagate": False},
        "adapterhub": {"handlers": ["adapterhub"], "level": "INFO", "propagate": False},
        "adapterhub.requests": {"level": "WARNING"},  # a line for each is for machines
    },
}
_JSON = {"class": "adapterhub.serving.telemetry.jsonlog.JsonFormatter"}
LOGGING_JSON = LOGGING | {
    "formatters": {"vllm": _JSON, "adapterhub": _JSON},
    "loggers": {name: LOGGING["loggers"][name] for name in ("vllm", "adapterhub")},
}

# Variables of the environment that would undo what OWNED protects: never handed on.
_DROPPED = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",  # opens /v1/load_lora_adapter and /adapters to everybody
    "VLLM_SERVER_DEV_MODE",  # opens /collective_rpc, /update_weights …
    "VLLM_SKIP_MODEL_NAME_VALIDATION",  # answers unknown adapters with the base
    "VLLM_API_KEY",
)
_LORA_RESOLVERS = ("lora_filesystem_resolver", "lora_hf_hub_resolver")  # vLLM's own; ours is the only one


@dataclass(frozen=True)
class ServeOptions:
    """What a person chose, or left to us (None)."""

    base: str  # folder or Hub id
    registry: str  # URL
    cache: Path  # verified local copies
    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    max_loras: int = 4
    max_lora_rank: int | None = None  # None: what the registry holds
    dtype: str = "auto"
    max_model_len: int | None = None  # tokens; None: the model's own, or what fits into the memory
    require_signed_by: tuple[Path, ...] = ()  # public keys; one of them must have signed what is served
    keys: bool | None = None  # None: where there are tenants, or others reach the address
    database: str | None = None  # URL of tenants and keys; None: there are none
    redis: str | None = None
    log_json: bool = False  # the log, a line a request in it, as JSON
    usage: Path | None = None  # folder in which usage waits for the database; None: usage is not billed
    metrics_adapters: int = 0  # adapters that are labels of their own in /metrics
    cache_limit: int | None = None  # bytes; None: as much as there is
    webhook: str | None = None  # URL that is told of swaps and rollouts
    webhook_secret: str = ""
    prompts: Path | None = None  # folder of prompts by which candidates are scored
    hang_seconds: float = 300.0  # without a step after which the engine is started again; 0: never
    vllm_args: tuple[str, ...] = ()


@dataclass(frozen=True)
class Holding:
    """What one adapter version of the registry needs from an engine."""

    ref: str  # acme/support@3
    rank: int
    size: int  # bytes on disk


def check_vllm_args(args: Sequence[str]) -> None:
    """Raises UsageError for a flag that `ah serve` owns, in whatever spelling vLLM's parser would take."""
    if args and not args[0].startswith("-"):
        raise UsageError(f"{args[0]!a} is not a flag", why="behind -- stand flags of vLLM", hint="ah serve --help")
    for arg in args:
        if flag := _owned(arg):
            raise UsageError(
                f"{arg.partition('=')[0]} cannot be passed to vLLM",
                why=OWNED[flag],
                hint=f"ah serve … --{flag} …" if OWNED[flag] == _OURS else "leave it out",
            )


def _owned(arg: str) -> str | None:
    """The owned flag that vLLM's parser would read ``arg`` as: underscores, ``=value``, ``--no-``, abbreviations."""
    if arg.startswith("--"):
        name = arg[2:].partition("=")[0].partition(".")[0].replace("_", "-").removesuffix("+")
        names = [n for n in (name, name.removeprefix("no-")) if n]
        exact = next((n for n in names if n in OWNED), None)
        return exact or next((flag for flag in OWNED for n in names if flag.startswith(n)), None)
    if arg.startswith("-") and len(arg) > 1:
        name = arg[1:].partition("=")[0]
        return next((flag for short, flag in _SHORT.items() if name.startswith(short) or short.startswith(name)), None)
    return None


def fitting_rank(held: Iterable[Holding]) -> int:
    """The smallest ``max_lora_rank`` that serves all of ``held``, and at least vLLM's own default of 16.

    Raises UsageError where an adapter is larger than any engine takes.
    """
    largest = max((h.rank for h in held), default=0)
    for rank in RANKS:
        if rank >= max(16, largest):
            return rank
    raise UsageError(f"an adapter has rank {largest}", why=f"the engine serves ranks up to {RANKS[-1]}")


def check_rank(rank: int) -> None:
    """Raises UsageError for a rank that vLLM does not take."""
    if rank not in RANKS:
        larger = next((r for r in RANKS if r >= rank), RANKS[-1])
        raise UsageError(
            f"--max-lora-rank {rank} is not possible",
            why=f"the engine takes {', '.join(map(str, RANKS))}",
            hint=f"ah serve … --max-lora-rank {larger}",
        )


def cpu_dtype(flags: Iterable[str]) -> str:
    """``auto`` for the model's own dtype where the CPU multiplies bfloat16 in hardware, else ``float32``.

    ``flags`` as /proc/cpuinfo lists them. Without AVX-512 (x86) a bfloat16 product falls back to scalar code and takes
    8 times as long as a float32 one (decision record 0009).
    """
    return "auto" if {"avx512bw", "amx_bf16", "bf16", "avx_ne_convert"} & set(flags) else "float32"


def working_set(held: Sequence[Holding], *, max_loras: int, memory: int) -> int:
    """``max_cpu_loras``: room for every adapter in use and one swap of each slot, in a quarter of ``memory`` bytes."""
    wanted = max(16, 2 * max_loras, len(held) + max_loras)
    largest = max((h.size for h in held), default=0)
    affordable = memory // 4 // largest if largest else wanted
    return max(max_loras, min(wanted, affordable))


def arguments(
    options: ServeOptions, config: ServeConfig, *, dtype: str, on_cpu: bool, traces: str | None = None
) -> list[str]:
    """The engine's command line. What was put behind ``--`` stands last, so it wins over defaults.

    ``traces`` is where spans go, a URL.
    """
    # With LoRA vLLM compiles nothing on a CPU. Told so up front, it takes its own operators, not those that the
    # compiler would have fused.
    eager = ["--enforce-eager"] if on_cpu else []
    return [
        *("--model", str(config.base), "--served-model-name", BASE_NAME),
        *("--host", config.host, "--port", str(config.port), "--api-server-count", "1"),
        *("--middleware", MIDDLEWARE, "--trust-request-chat-template"),
        *("--enable-lora", "--max-loras", str(config.max_loras), "--max-lora-rank", str(config.max_lora_rank)),
        *("--max-cpu-loras", str(config.max_cpu_loras)),
        *("--dtype", dtype, "--max-model-len", str(options.max_model_len or "auto")),
        *("--enable-prefix-caching", "--enable-prompt-tokens-details"),
        *("--no-enable-log-requests", "--disable-uvicorn-access-log"),
        "--disable-fastapi-docs",
        *eager,
        *(("--otlp-traces-endpoint", traces) if traces else ()),
        *options.vllm_args,
    ]


def environment(inherited: Mapping[str, str], config: ServeConfig, *, defaults: Mapping[str, str]) -> dict[str, str]:
    """The engine's environment: the caller's, without what would open a back door. ``defaults`` yield to it."""
    plugins = [p for p in inherited.get("VLLM_PLUGINS", "").split(",") if p and p not in _LORA_RESOLVERS]
    kept = {name: value for name, value in inherited.items() if name not in _DROPPED}
    ours = {
        "VLLM_PLUGINS": ",".join(dict.fromkeys([*plugins, "adapterhub"])),
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",  # vLLM's spans the way of ours; its default is gRPC
        "VLLM_USE_RUST_FRONTEND": "0",  # a separate program, without middleware
        "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1",  # to say that it is dead (503), until `supervisor` starts it again
    }
    return {"VLLM_NO_USAGE_STATS": "1", **defaults, **kept, **ours, **config.to_env()}
