"""What `ah serve` hands to the code inside the engine's process: one frozen value, through one environment variable.

`engine.py` writes it, `plugin.py` and `middleware.py` read it. Without it the package is inert in any vLLM.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

SWITCH = "ADAPTERHUB_SERVE"  # "1" turns the plug-in on; anything else leaves a stock vLLM alone
VARIABLE = "ADAPTERHUB_SERVE_CONFIG"


@dataclass(frozen=True)
class ServeConfig:
    """The settings of one replica."""

    registry: str  # URL
    cache: Path  # verified local copies
    base: Path  # the base model's folder
    base_name: str  # as the operator named it, for people
    host: str
    port: int
    max_loras: int  # adapters in one batch: engine slots
    max_cpu_loras: int  # adapters that the engine holds
    max_lora_rank: int
    require_signed_by: tuple[Path, ...] = ()  # public keys; one of them must have signed what is served
    database: str | None = None  # URL of tenants and keys; None: the single user, without keys
    redis: str | None = None  # URL of shared limits; None: this replica counts alone
    ledger: str | None = None  # URL of the database that usage goes to; None: it is not billed
    spool: Path | None = None  # where usage waits for it
    metrics_adapters: int = 0  # adapters that are labels of their own in /metrics
    cache_limit: int | None = None  # bytes that the local copies may take
    webhook: str | None = None  # URL that is told what happens
    webhook_secret: str = ""  # signs what it is told
    prompts: Path | None = None  # folder of prompts by which candidates are scored
    hang_seconds: float = 300.0  # without a step after which the engine hangs; 0: never
    poll_seconds: float = 2.0  # between looks at the change logs
    load_seconds: float = 30.0  # that a request waits for its adapter
    score_seconds: float = 600.0  # between two scores of a candidate that has callers
    rescan_seconds: float = 60.0  # between full looks, because hints can be lost

    def to_env(self) -> dict[str, str]:
        return {SWITCH: "1", VARIABLE: json.dumps(asdict(self), default=str)}

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> ServeConfig | None:
        """None where this process was not started by `ah serve`."""
        if environ.get(SWITCH) != "1":
            return None
        values = json.loads(environ[VARIABLE])
        names = ("cache", "base", "spool", "prompts")
        paths = {name: Path(values[name]) for name in names if values[name] is not None}
        return cls(**values | paths | {"require_signed_by": tuple(map(Path, values["require_signed_by"]))})
