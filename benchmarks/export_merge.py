"""Export of a 2.2 GB bfloat16 Llama-shaped model in five shards, all-linear adapter of rank 16: ours against PEFT.

Both sides start from the same folders, with torch (and PEFT) already imported and the files in the page cache. Ours is
timed until the model is durable (fsync of every file and folder) under its final name; PEFT's load + merge + save is
timed as it is, without any sync. The certificate is timed apart. Medians; memory is the peak above the interpreter with
torch imported. `cp` + `sync` of the same folder stands beside them as the floor.

    python benchmarks/export_merge.py [--rounds 5] [--peft-rounds 2]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine

BENCH = Path(__file__).resolve().parents[1] / ".bench" / "export_merge"
SHARDS = 5
RANK = 16
CONFIG = {  # TinyLlama's shape: 1.1 billion parameters
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peft-rounds", type=int, default=2, help="PEFT's way is slow and steady")
    parser.add_argument("--side", choices=["ours", "peft"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps({"ours": run_ours, "peft": run_peft}[arguments.side]()))
        return
    make_inputs()
    ours, peft, copies = [], [], []
    for i in range(arguments.rounds):
        copies.append(copy_and_sync())
        ours.append(in_own_process("ours"))
        if i < arguments.peft_rounds:
            peft.append(in_own_process("peft"))
    shutil.rmtree(BENCH / "out", ignore_errors=True)
    report(ours, peft, copies)


def report(ours: list[dict[str, Any]], peft: list[dict[str, Any]], copies: list[float]) -> None:
    seconds, slow = median(ours, "seconds"), median(peft, "seconds")
    memory, most = max(run["memory_mb"] for run in ours), max(run["memory_mb"] for run in peft)
    worst = max(run["worst"] for run in ours)
    share = max(run["not_nearest"] for run in ours) / ours[0]["sampled"]
    rows = [
        row(
            "export: time, PEFT's load + merge + save", seconds, slow, "s", bar="ratio ≤ 0.25", met=seconds <= slow / 4
        ),
        row("export: peak memory above torch, PEFT's", memory, most, "MB", bar="≤ 400", met=memory <= 400),
        row(
            "export: distance to the float64 sum, the most one rounding allows", worst, 1, "", bar="≤ 1", met=worst <= 1
        ),
        row("export: weights that are not the nearest, PEFT's", share, peft[0]["not_nearest"], "share"),
        row("export: time, cp + sync", seconds, statistics.median(copies), "s"),
        row(
            "export: time of the certificate, PEFT's load + merge + save",
            median(ours, "certificate_seconds"),
            slow,
            "s",
        ),
    ]
    print(f"ours {rounded(ours)}, PEFT {rounded(peft)}, cp + sync {[round(c, 2) for c in copies]}", file=sys.stderr)
    print(json.dumps({"rows": rows}, ensure_ascii=False))


def row(name: str, ours: float, peer: float, unit: str, **more: Any) -> dict[str, Any]:
    numbers = {"ours": round(ours, 6), "peer": round(peer, 6), "ratio": round(ours / peer, 4)}
    return {"name": name, **numbers, "unit": unit, "machine": machine(), **more}


def median(runs: list[dict[str, Any]], key: str) -> float:
    return round(statistics.median(run[key] for run in runs), 3)


def rounded(runs: list[dict[str, Any]]) -> list[float]:
    return [round(run["seconds"], 2) for run in runs]


def in_own_process(side: str) -> dict[str, Any]:
    shutil.rmtree(BENCH / "out", ignore_errors=True)
    done = subprocess.run([sys.executable, __file__, "--side", side], check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def copy_and_sync() -> float:
    shutil.rmtree(BENCH / "out", ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", BENCH / "base", BENCH / "out"], check=True)
    subprocess.run(["sync", "-f", BENCH / "out"], check=True)
    return time.perf_counter() - start


def run_ours() -> dict[str, Any]:
    import torch  # noqa: F401  imported before the clock starts, as for PEFT

    from adapterhub.base import find_base
    from adapterhub.export import export_model

    before = peak_memory(reset=True)
    result = export_model(BENCH / "adapter", find_base(str(BENCH / "base")), BENCH / "out")
    assert result.certificate is not None
    return {
        "seconds": result.merge_seconds,
        "certificate_seconds": result.certificate_seconds,
        "memory_mb": (peak_memory() - before) / 1e6,
        "sampled": result.certificate.sampled,
        "not_nearest": result.certificate.not_nearest,
        "worst": result.certificate.worst,
    }


def run_peft() -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    before = peak_memory(reset=True)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(BENCH / "base", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, BENCH / "adapter").merge_and_unload()
    merged.save_pretrained(BENCH / "out")
    seconds = time.perf_counter() - start
    memory = (peak_memory() - before) / 1e6
    return {"seconds": seconds, "memory_mb": memory, "not_nearest": peft_not_nearest(merged)}


def peft_not_nearest(merged: Any) -> float:
    """Share of PEFT's weights, in one layer, that are not the float64 sum rounded once."""
    import torch
    from safetensors import safe_open

    name = "model.layers.0.mlp.up_proj"
    with safe_open(BENCH / "adapter" / "adapter_model.safetensors", "pt") as file:
        a, b = (file.get_tensor(f"base_model.model.{name}.lora_{x}.weight").double() for x in "AB")
    index = json.loads((BENCH / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(BENCH / "base" / index[f"{name}.weight"], "pt") as file:
        truth = file.get_tensor(f"{name}.weight").double() + 2.0 * (b @ a)
    return float((merged.state_dict()[f"{name}.weight"] != truth.to(torch.bfloat16)).double().mean())


def peak_memory(*, reset: bool = False) -> int:
    """The largest resident size so far, in bytes; ``reset`` starts over from the present one."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM: this benchmark needs Linux")


def make_inputs() -> None:
    """The base and the adapter, made once and kept."""
    import torch
    from safetensors.torch import save_file

    if (BENCH / "adapter").is_dir():
        return
    shutil.rmtree(BENCH, ignore_errors=True)
    (BENCH / "base").mkdir(parents=True)
    torch.manual_seed(0)
    shapes = list(llama_shapes().items())
    size = sum(rows * columns for _, (rows, columns) in shapes)
    weight_map, shard, done = {}, {}, 0
    for i, (name, shape) in enumerate(shapes):
        norm = shape[0] == 1
        shard[name] = torch.ones(shape[1]).bfloat16() if norm else (torch.randn(shape) * 0.02).bfloat16()
        done += shape[0] * shape[1]
        number = min(SHARDS, len(set(weight_map.values())) + 1)
        if done >= size * number / SHARDS or i == len(shapes) - 1:
            file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
            save_file(shard, BENCH / "base" / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    index = {"metadata": {"total_size": 2 * size}, "weight_map": weight_map}
    (BENCH / "base" / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (BENCH / "base" / "config.json").write_text(json.dumps(CONFIG, indent=1))
    make_adapter(shapes)


def make_adapter(shapes: list[tuple[str, tuple[int, int]]]) -> None:
    import torch
    from safetensors.torch import save_file

    factors = {}
    for name, (rows, columns) in shapes:
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in LINEAR:
            factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
            factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(LINEAR),
        "bias": "none",
    }
    folder = BENCH / "adapter.partial"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    folder.rename(BENCH / "adapter")


def llama_shapes() -> dict[str, tuple[int, int]]:
    """Name → (rows, columns) in checkpoint order; a norm is one row."""
    width, inner, vocabulary = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    keys = width // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (width, width),
            f"{layer}.self_attn.k_proj.weight": (keys, width),
            f"{layer}.self_attn.v_proj.weight": (keys, width),
            f"{layer}.self_attn.o_proj.weight": (width, width),
            f"{layer}.mlp.gate_proj.weight": (inner, width),
            f"{layer}.mlp.up_proj.weight": (inner, width),
            f"{layer}.mlp.down_proj.weight": (width, inner),
            f"{layer}.input_layernorm.weight": (1, width),
            f"{layer}.post_attention_layernorm.weight": (1, width),
        }
    return shapes | {"model.norm.weight": (1, width), "lm_head.weight": (vocabulary, width)}


if __name__ == "__main__":
    main()
