"""Random LoRA configurations: logits of the exported model against PEFT's unmerged forward, in float32.

Ranks, patterns, rsLoRA, DoRA, biases, modules to save, tied heads, embeddings, trainable tokens, fused experts, resized
vocabularies, dtypes and shards on tiny models of twelve architectures. Counted are configurations that PEFT can make;
each must answer within 1e-5 or be refused with a reason. One that does neither is printed with its largest logit:
float32 keeps 7 digits of it, so that beyond 1e-5 of the largest logit it is a silent difference, and the run fails.

Two more rows tell where a difference comes from: both models computing in float64, which leaves what the exported
weights lost by being float32; and PEFT's own logits in float32 against its own in float64.

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
from lora_configurations import Configuration, compare, random_configuration
from machine import machine

LIMIT = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configurations", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    exported, worst, exact, noise, silent = 0, 0.0, 0.0, 0.0, 0
    kinds: Counter[str] = Counter()
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
        kinds.update(features(configuration))
        worst = max(worst, outcome.error)
        exact, noise = max(exact, outcome.exact), max(noise, outcome.noise)
        silent += not outcome.error <= LIMIT * max(1.0, outcome.largest)
        if not outcome.error <= LIMIT:
            print(f"{outcome.error:.3g}, largest logit {outcome.largest:.3g}: {configuration}", file=sys.stderr)
    for why, count in refusals.most_common():
        print(f"refused {count:4}  {why}", file=sys.stderr)
    print("exported with", dict(kinds.most_common()), file=sys.stderr)
    impossible = seed - arguments.first - exported - refusals.total()
    print(f"exported {exported}, refused {refusals.total()}, {impossible} that PEFT cannot make")
    what = "export vs. PEFT unmerged"
    counted = f"{exported} exported, {refusals.total()} refused, {silent} silent differences"
    rows = [
        row(f"{what}, float32, random configurations: {counted}; largest difference", worst)
        | {"bar": f"≤ {LIMIT:g}, 0 silent differences", "met": worst <= LIMIT and not silent},
        row(f"{what}, both computing in float64; largest difference", exact),
        row("PEFT unmerged in float32, from itself in float64; largest difference", noise),
    ]
    print(json.dumps({"rows": rows}, ensure_ascii=False))
    sys.exit(1 if silent else 0)


def features(configuration: Configuration) -> list[str]:
    """What is told of it in the tally."""
    lora = configuration.lora
    named = ("use_dora", "use_rslora", "modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias")
    found = [name for name in (*named, "rank_pattern", "alpha_pattern", "ensure_weight_tying") if lora.get(name)]
    found += ["bias"] if lora.get("bias", "none") != "none" else []
    found += ["lm_head"] if "lm_head" in lora["target_modules"] else []
    found += [name for name in ("tied", "resized", "max_shard_size") if getattr(configuration, name)]
    return [*found, configuration.kind, configuration.dtype]


def row(name: str, value: float) -> dict[str, object]:
    return {"name": name, "ours": value, "peer": None, "ratio": None, "unit": "logits", "machine": machine()}


if __name__ == "__main__":
    main()
