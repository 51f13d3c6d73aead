"""`ah plan --probe` against the run that it speaks of: is the told time within 20 % of the real one?

The support bot of the examples on SmolLM2: three steps of a probe, then the whole training with its evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
WITHIN = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=1.0, help="of the 91 rows")
    parser.add_argument("--batch", type=int, default=4, help="rows a step")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    from machine import machine

    from adapterhub.trainers import prepare, read_config, read_yaml, train
    from adapterhub.trainers.events import Event, Stage
    from adapterhub.trainers.probe import probe

    base = subprocess.run([sys.executable, ROOT / "scripts" / "demo_base.py"], check=True, stdout=subprocess.PIPE)
    example = ROOT / "examples" / "support-bot"
    with tempfile.TemporaryDirectory() as folder:
        reading = read_config(read_yaml(example / "config.yml"))
        config = replace(
            reading.config,
            base_model=base.stdout.decode().strip(),
            micro_batch_size=arguments.batch,
            num_epochs=arguments.epochs,
            output_dir=f"{folder}/run",
        )
        prepared = prepare(config, beside={"datasets": example, "test_datasets": example})
        told = probe(prepared)
        ends: list[float] = []

        def listen(event: Event) -> None:
            if isinstance(event, Stage) and event.text == "writing the report":
                ends.append(time.monotonic())
            elif not isinstance(event, Stage) and not starts:
                starts.append(time.monotonic())

        starts: list[float] = []
        train(replace(reading, config=config), prepared, on_event=listen)
        real = ends[0] - starts[0]
    ratio = told.seconds / real
    print(
        json.dumps(
            {
                "name": f"plan --probe: told time over real time, {told.steps} steps",
                "ours": round(told.seconds, 2),
                "peer": round(real, 2),
                "ratio": round(ratio, 3),
                "unit": "s",
                "bar": f"within {WITHIN:.0%}",
                "met": abs(ratio - 1) <= WITHIN,
                "machine": machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
