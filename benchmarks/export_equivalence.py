"""Random LoRA configurations: logits of the exported model against PEFT's unmerged forward, in float32.

Ranks, patterns, rsLoRA, DoRA, biases, modules to save, tied heads, embeddings, resized vocabularies, dtypes and shards
on tiny models of eight architectures. Counted are configurations that PEFT can make; each must answer within 1e-5 or
be refused with a reason. One that does neither is printed with its largest logit: float32 keeps 7 digits of it, so
that beyond 1e-5 of the largest logit it is a silent difference, and the run fails.

    python benchmarks/export_equivalence.py --configurations 500
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections import Counter
from pathlib import Path

import transformers
from lora_configurations import compare, random_configuration
from machine import machine

LIMIT = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configurations", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    exported, worst, silent = 0, 0.0, 0
    refusals: Counter[str] = Counter()
    seed = arguments.first
    while exported + refusals.total() < arguments.configurations:
        configuration = random_configuration(seed)
        seed += 1
        with tempfile.TemporaryDirectory() as folder:
            outcome = compare(configuration, Path(folder))
        if outcome is None:
            continue
        if outcome.refused:
            refusals[outcome.refused.rpartition(": ")[2][:60]] += 1
            continue
        exported += 1
        worst = max(worst, outcome.error)
        silent += not outcome.error <= LIMIT * max(1.0, outcome.largest)
        if not outcome.error <= LIMIT:
            print(f"{outcome.error:.3g}, largest logit {outcome.largest:.3g}: {configuration}", file=sys.stderr)
    for why, count in refusals.most_common():
        print(f"refused {count:4}  {why}", file=sys.stderr)
    impossible = seed - arguments.first - exported - refusals.total()
    print(f"exported {exported}, refused {refusals.total()}, {impossible} that PEFT cannot make")
    print(json.dumps(row(exported, refusals.total(), worst, silent)))
    sys.exit(1 if silent else 0)


def row(exported: int, refused: int, worst: float, silent: int) -> dict[str, object]:
    return {
        "name": f"export vs. PEFT unmerged, float32, random configurations: {exported} exported, {refused} refused, "
        f"{silent} silent differences; largest difference",
        "ours": worst,
        "peer": None,
        "ratio": None,
        "unit": "logits",
        "bar": f"≤ {LIMIT:g}, 0 silent differences",
        "met": worst <= LIMIT and not silent,
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
