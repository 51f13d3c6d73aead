"""What quantising costs: bytes, seconds, the weights' error, and how far the answers part from the plain export's.

SmolLM2 and the support bot trained on it (``--adapter`` names another one), exported once in bfloat16 and once in each
scheme, with the certificate. Answers are compared by transformers in float32: the KL divergence of the next token, and
greedy tokens of held-out questions. Every row's peer is the plain bfloat16 export.

    python benchmarks/export_quantised.py [--base DIR] [--adapter DIR] [--prompts 20] [--tokens 32]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export_greedy import ROOT, prompts, train
from machine import machine

from adapterhub.base import find_base
from adapterhub.export import ExportResult, export_model
from adapterhub.export.answers import Divergence, compare

SCHEMES: dict[str, dict[str, Any]] = {
    "w8a8": {"quantize": "w8a8"},
    "w8a16": {"quantize": "w8a16"},
    "w4a16": {"quantize": "w4a16", "group_size": 64},  # SmolLM2 is 576 wide
    "fp8": {"quantize": "fp8"},
}


@dataclass(frozen=True)
class Run:
    """One export, and how its answers compare with the plain one's."""

    result: ExportResult
    divergence: Divergence
    agreement: float  # share of greedy tokens before the first that differs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, default=ROOT / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--adapter", type=Path, help="a trained adapter; left out, the support bot is trained")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = options.adapter or train(options.base, folder / "run")
        base = find_base(str(options.base))
        plain = export_model(adapter, base, folder / "plain", dtype="bfloat16")
        asked = prompts()[: options.prompts]
        expected = greedy(plain.path, asked, options.tokens)
        rows = []
        for scheme, how in SCHEMES.items():
            result = export_model(adapter, base, folder / scheme, dtype="bfloat16", **how)
            found = greedy(result.path, asked, options.tokens)
            run = Run(result, compare(plain.path, result.path), agreement(expected, found))
            rows += told(scheme, run, plain)
            print(json.dumps(rows[-5:], ensure_ascii=False), file=sys.stderr)
    print(json.dumps({"rows": rows}, ensure_ascii=False))


def greedy(folder: Path, asked: list[str], tokens: int) -> list[list[int]]:
    """The answer to each prompt, token by token, to the end even where the model would stop."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    packed = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    settings = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in asked:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        made = model.generate(**inputs, **options)[0]
        answers.append(made[inputs["input_ids"].shape[1] :].tolist())
    return answers


def agreement(expected: list[list[int]], found: list[list[int]]) -> float:
    """Tokens before the first that differs; behind it the two answer different texts."""
    same = 0
    for a, b in zip(expected, found, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / sum(map(len, expected))


def told(scheme: str, run: Run, plain: ExportResult) -> list[dict[str, Any]]:
    result, certificate = run.result, run.result.certificate
    assert certificate is not None
    seconds, before = result.merge_seconds, plain.merge_seconds
    error, divergence = certificate.error, run.divergence
    farthest = max(check.error for check in certificate.quantised)
    figures: list[tuple[str, float, float, float, str, dict[str, Any]]] = [
        ("bytes", result.bytes_written, plain.bytes_written, result.bytes_written / plain.bytes_written, "bytes", {}),
        ("seconds, durable", seconds, before, seconds / before, "s", {"certificate_s": result.certificate_seconds}),
        ("weight error, relative", error, 0, error, "Frobenius", {"largest": farthest}),
        ("KL divergence", divergence.kl_mean, 0, divergence.kl_mean, "nats", divergence.to_json()),
        ("greedy tokens before the first other one", run.agreement, 1, run.agreement, "share", {}),
    ]
    return [
        {
            "name": f"export --quantize {scheme}: {what}",
            "ours": ours,
            "peer": peer,
            "ratio": ratio,
            "unit": unit,
            "machine": machine(),
            **more,
        }
        for what, ours, peer, ratio, unit, more in figures
    ]


if __name__ == "__main__":
    main()
