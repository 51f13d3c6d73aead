"""Quantised exports in the engine: vLLM's own loader and CPU kernels, none of our code in its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ASK = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    question = [{"role": "user", "content": "What is the capital of France?"}]
    for folder in sys.argv[1:]:
        engine = LLM(folder, enforce_eager=True, max_model_len=256, distributed_executor_backend="uni")
        answer = engine.chat(question, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)[0].outputs[0]
        print("said:" + json.dumps(answer.text), flush=True)
        del engine
"""


@pytest.mark.engine
def test_vllm_loads_and_answers(base_dir: Path, adapter_writer: Any, ah: Any, tmp_path: Path) -> None:
    adapter = adapter_writer(tmp_path / "adapter", base=base_dir, scale=0.01)
    folders = {"w8a8": tmp_path / "w8a8", "w4a16": tmp_path / "w4a16"}
    for name, folder in folders.items():
        size = ("--group-size", "64") if name == "w4a16" else ()  # 576 columns
        ran = ah("export", adapter, "--base", base_dir, "--to", folder, "--quantize", name, *size, "--json")
        assert ran.code == 0, ran.err
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    own = {"VLLM_PLUGINS": "none", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    ran = subprocess.run(
        [sys.executable, script, *map(str, folders.values())],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = [json.loads(line.removeprefix("said:")) for line in ran.stdout.splitlines() if line.startswith("said:")]
    assert len(said) == 2, ran.stderr[-3000:]
    assert all("Paris" in answer for answer in said)
