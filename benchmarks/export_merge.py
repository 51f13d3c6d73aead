"""Export of a 2.2 GB bfloat16 Llama-shaped model in five shards: ours against PEFT, mergekit and `cp` + `sync`.

All sides start from the same folders, with torch (and PEFT, mergekit) already imported and the files in the page cache.
Ours is timed until the model is durable (fsync of every file and folder) under its final name; PEFT's load + merge +
save and mergekit's run are timed as they are, without any sync. The certificate is timed apart. Medians; memory is the
peak above the interpreter with torch imported. mergekit has a virtual environment of its own, made here: it merges a
LoRA by loading the whole model through PEFT into a cache folder, and then copies that. Where it cannot be installed or
fails, its rows say why, and the others stand.

    python benchmarks/export_merge.py [--rounds 5] [--peft-rounds 3] [--no-mergekit]
    python benchmarks/export_merge.py --small --rounds 1        # 0.4 GB: whether everything runs
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

from machine import machine
from models import ATTENTION, LLAMA_1B, SMALL, peak_memory, warm, write_adapter, write_base

SIZE = LLAMA_1B if "--small" not in sys.argv else SMALL
BENCH = Path(__file__).resolve().parents[1] / ".bench" / ("export_merge" if SIZE is LLAMA_1B else "export_merge_small")
BASE, OUT, MERGEKIT = BENCH / "base", BENCH / "out", BENCH / "mergekit"
ADAPTERS = {"linear": BENCH / "adapter", "attention": BENCH / "adapter-attention"}
SAMPLED = [
    f"model.layers.{layer}.{part}" for layer in (0, SIZE.layers - 1) for part in ("self_attn.q_proj", "mlp.up_proj")
]

Run = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peft-rounds", type=int, default=3, help="PEFT's way is slow and steady; mergekit runs once")
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument("--small", action="store_true", help="a model of 0.4 GB: its figures say little")
    parser.add_argument("--keep", action="store_true", help="do not delete the models afterwards")
    parser.add_argument("--side", choices=["linear", "attention", "peft", "mergekit"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        sides = {"peft": run_peft, "mergekit": run_mergekit}
        print(json.dumps(sides[arguments.side]() if arguments.side in sides else run_ours(arguments.side)))
        return
    write_base(BASE, SIZE, shards=5)
    write_adapter(ADAPTERS["linear"], SIZE)
    write_adapter(ADAPTERS["attention"], SIZE, targets=ATTENTION)
    ours, attention, peft, copies = [], [], [], []
    for i in range(arguments.rounds):
        copies.append(copy_and_sync())
        ours.append(in_own_process("linear"))
        attention.append(in_own_process("attention"))
        if i < arguments.peft_rounds:
            peft.append(in_own_process("peft"))
    mergekit = "--no-mergekit" if arguments.no_mergekit else with_mergekit()
    if not arguments.keep:
        shutil.rmtree(BENCH)
    report(ours, attention, peft, copies, mergekit)


def report(ours: list[Run], attention: list[Run], peft: list[Run], copies: list[float], mergekit: Run | str) -> None:
    seconds, slow, copied = median(ours), median(peft), statistics.median(copies)
    narrow = median(attention)
    memory = max(run["memory_mb"] for run in (*ours, *attention))
    most = min(run["memory_mb"] for run in peft)
    worst = max(run["worst"] for run in ours)
    certificate = median(ours, "certificate_seconds")
    rows = [
        row("export: time, PEFT's load + merge + save", seconds, slow, "s", bar="ratio ≤ 1/8", met=seconds <= slow / 8),
        row("export: time, cp + sync", seconds, copied, "s", bar="ratio ≤ 2.5", met=seconds <= 2.5 * copied),
        row(
            "export, attention only: time, cp + sync",
            narrow,
            copied,
            "s",
            bar="ratio ≤ 1.3",
            met=narrow <= 1.3 * copied,
        ),
        row("export: peak memory above torch, PEFT's", memory, most, "MB", bar="≤ 200", met=memory <= 200),
        row(
            "export: distance to the float64 sum, the most one rounding allows", worst, 1, "", bar="≤ 1", met=worst <= 1
        ),
        best("export: weights that are not the nearest, PEFT's", *errors(ours, peft), "share"),
        row("export: time of the certificate, PEFT's load + merge + save", certificate, slow, "s"),
    ]
    if isinstance(mergekit, str):
        rows.append({"name": f"export: mergekit was not measured ({mergekit})", "machine": machine()})
    else:
        rows += [
            best("export: time, mergekit's", seconds, mergekit["seconds"], "s"),
            best("export: peak memory above torch, mergekit's", memory, mergekit["memory_mb"], "MB"),
            best("export: weights that are not the nearest, mergekit's", *errors(ours, [mergekit]), "share"),
        ]
    told = {
        "ours": ours,
        "attention": attention,
        "PEFT": peft,
        "mergekit": [] if isinstance(mergekit, str) else [mergekit],
    }
    print({side: [round(run["seconds"], 2) for run in runs] for side, runs in told.items()}, file=sys.stderr)
    print("cp + sync", [round(c, 2) for c in copies], file=sys.stderr)
    print(json.dumps({"rows": rows}, ensure_ascii=False))


def row(name: str, ours: float, peer: float, unit: str, **more: Any) -> Run:
    ratio = round(ours / peer, 4) if peer else None
    numbers = {"ours": round(ours, 6), "peer": round(peer, 6), "ratio": ratio}
    return {"name": name, **numbers, "unit": unit, "machine": machine(), **more}


def best(name: str, ours: float, peer: float, unit: str) -> Run:
    """A row of the comparison that ours should win, or tie."""
    return row(name, ours, peer, unit, bar="≤ theirs", met=ours <= peer)


def median(runs: list[Run], key: str = "seconds") -> float:
    return round(statistics.median(run[key] for run in runs), 3)


def errors(ours: list[Run], peer: list[Run]) -> tuple[float, float]:
    return ours[0]["not_nearest"], peer[0]["not_nearest"]


def in_own_process(side: str, python: str = sys.executable) -> Run:
    shutil.rmtree(OUT, ignore_errors=True)
    os.sync()  # what the side before left to the disk is not this side's
    warm(BASE)
    command = [python, __file__, "--side", side, *(["--small"] if SIZE is SMALL else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result: Run = json.loads(done.stdout.splitlines()[-1])
    adapter = ADAPTERS["attention" if side == "attention" else "linear"]
    return result | {"not_nearest": not_nearest(adapter)}


def copy_and_sync() -> float:
    shutil.rmtree(OUT, ignore_errors=True)
    os.sync()
    warm(BASE)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", BASE, OUT], check=True)
    subprocess.run(["sync", "-f", OUT], check=True)
    return time.perf_counter() - start


def run_ours(adapter: str) -> Run:
    import torch  # noqa: F401  imported before the clock starts, as for PEFT

    from adapterhub.base import find_base
    from adapterhub.export import export_model

    before = peak_memory(reset=True)
    result = export_model(ADAPTERS[adapter], find_base(str(BASE)), OUT)
    assert result.certificate is not None
    return {
        "seconds": result.merge_seconds,
        "certificate_seconds": result.certificate_seconds,
        "memory_mb": (peak_memory() - before) / 1e6,
        "worst": result.certificate.worst,
    }


def run_peft() -> Run:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    before = peak_memory(reset=True)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, ADAPTERS["linear"]).merge_and_unload().save_pretrained(OUT)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory_mb": (peak_memory() - before) / 1e6}


def run_mergekit() -> Run:
    import torch  # noqa: F401
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from peft import PeftModel  # noqa: F401  imported before the clock starts
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    cache = BENCH / "mergekit-cache"
    shutil.rmtree(cache, ignore_errors=True)
    config = {
        "merge_method": "passthrough",
        "models": [{"model": f"{BASE}+{ADAPTERS['linear']}"}],
        "dtype": "bfloat16",
    }
    options = MergeOptions(lora_merge_cache=str(cache), copy_tokenizer=False, write_model_card=False)
    before = peak_memory(reset=True)
    start = time.perf_counter()
    run_merge(MergeConfiguration.model_validate(config), str(OUT), options)
    seconds = time.perf_counter() - start
    shutil.rmtree(cache)
    return {"seconds": seconds, "memory_mb": (peak_memory() - before) / 1e6}


def with_mergekit() -> Run | str:
    """One run, or why there is none."""
    try:
        return in_own_process("mergekit", python=mergekit_python())
    except (subprocess.CalledProcessError, OSError, KeyError) as error:
        shutil.rmtree(MERGEKIT, ignore_errors=True)
        return f"it cannot be installed here, or fails: {error!r:.200}"


def mergekit_python() -> str:
    """Its environment: it wants other versions than ours, but for torch."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
    from setup_env import holds_cpu_torch, pip_settings, uv_environment

    python = MERGEKIT / "bin" / "python"
    if not python.is_file():
        venv.create(MERGEKIT)
        settings = pip_settings()
        command = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", str(python)]
        command += [] if holds_cpu_torch(settings.get("find-links", [])) else ["--torch-backend", "auto"]
        environment = os.environ | uv_environment(settings, os.environ)
        subprocess.run([*command, "mergekit", f"torch=={torch.__version__}"], check=True, env=environment)
    return str(python)


def not_nearest(adapter: Path) -> float:
    """Share of the weights of some layers in the folder OUT that are not the float64 sum rounded once."""
    import torch
    from safetensors import safe_open

    def read(folder: Path, name: str) -> torch.Tensor:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                if name in opened.keys():  # noqa: SIM118
                    return opened.get_tensor(name)
        raise KeyError(name)

    wrong = compared = 0
    for name in SAMPLED:
        base, found = read(BASE, f"{name}.weight"), read(OUT, f"{name}.weight")
        truth = base.double()
        if "self_attn" in name or adapter == ADAPTERS["linear"]:
            a, b = (read(adapter, f"base_model.model.{name}.lora_{x}.weight").double() for x in "AB")
            truth = truth + 2.0 * (b @ a)
        wrong += int((found != truth.to(torch.bfloat16)).sum())
        compared += found.numel()
    return wrong / compared


if __name__ == "__main__":
    main()
