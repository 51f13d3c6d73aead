"""How long `ah --help` and `ah ls` take as whole processes, beside an interpreter that does nothing.

The registry holds one adapter of one version. Medians, after one run of each that leaves the compiled modules behind.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine
from safetensors.numpy import save_file

BAR = 0.35  # seconds
RUNS = 10


def main() -> None:
    ah = str(Path(sys.executable).with_name("ah"))
    with tempfile.TemporaryDirectory(prefix="ah-bench-") as folder:
        environment = os.environ | {"AH_HOME": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled once, as in anybody's second start
        adapter = write_adapter(Path(folder) / "adapter")
        subprocess.run(
            [ah, "publish", adapter, "--name", "acme/support"], env=environment, check=True, stdout=subprocess.DEVNULL
        )
        commands = {
            "peer": [sys.executable, "-c", "pass"],
            "ah_help": [ah, "--help"],
            "ah_ls": [ah, "ls"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for run in range(RUNS + 1):
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
                if run:
                    times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        {
            "name": name,
            "ours": round(medians[name], 3),
            "peer": round(medians["peer"], 3),
            "ratio": round(medians[name] / medians["peer"], 1),
            "unit": "s",
            "machine": machine(),
            "bar": BAR,
            "met": medians[name] <= BAR,
        }
        for name in ("ah_help", "ah_ls")
    ]
    print(json.dumps({"rows": rows}))


def write_adapter(path: Path) -> Path:
    path.mkdir()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    ones = np.ones((4, 64), dtype=np.float32)
    save_file(
        {f"{prefix}.lora_A.weight": ones, f"{prefix}.lora_B.weight": ones.T.copy()}, path / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


if __name__ == "__main__":
    main()
