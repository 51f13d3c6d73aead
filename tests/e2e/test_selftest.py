"""An engine that would answer the base with somebody's adapter does not come up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.errors import EngineError
from adapterhub.serving.arguments import ServeOptions
from adapterhub.serving.engine.engine import Engine, prepare

STOCK = """
import sys, types
module = types.ModuleType("adapterhub.serving.engine.cpu_lora")
module.install = lambda: None
sys.modules[module.__name__] = module
"""


@pytest.mark.engine
@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="vLLM's LoRA product is wrong on CPU only")
def test_vllms_own_lora_product_on_cpu_fails_the_self_test(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When this fails, vLLM's product has become right: cpu_lora can go."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    options = ServeOptions(
        base=str(base_dir),
        registry=(tmp_path / "registry").as_uri(),
        cache=tmp_path / "cache",
        port=0,
        dtype="float32",
        max_model_len=256,
        vllm_args=("--enforce-eager",),
    )
    (tmp_path / "sitecustomize.py").write_text(STOCK)
    launch = prepare(options)
    launch = replace(launch, environment=dict(launch.environment) | {"PYTHONPATH": str(tmp_path)})
    with pytest.raises(EngineError), Engine(launch):
        pass
    assert "the base is answered with an adapter when they share a batch" in launch.log.read_text()
