"""The exported model answers as PEFT does without merging: logits, in float32, for every kind of adapter we merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub.export import export_model

pytestmark = pytest.mark.slow  # transformers and PEFT take seconds to import

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all linear": ({"r": 8, "lora_alpha": 16}, {}),
    "rank 1": ({"r": 1, "lora_alpha": 1}, {}),
    "attention only": ({"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]}, {}),
    "rslora": ({"r": 16, "lora_alpha": 4, "use_rslora": True}, {}),
    "rank pattern": ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}}, {}),
    "alpha pattern": ({"r": 4, "lora_alpha": 8, "alpha_pattern": {r"layers\.0\..*": 3, "down_proj": 20}}, {}),
    "both, rslora": (
        {"r": 3, "rank_pattern": {"k_proj": 6}, "alpha_pattern": {"k_proj": 5}, "use_rslora": True}, {}
    ),
    "with the head": ({"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"]}, {}),
    "a regex": ({"r": 4, "target_modules": r".*layers\.1\.(self_attn|mlp)\.(o|down)_proj"}, {}),
    "some layers": ({"r": 4, "layers_to_transform": [1], "layers_pattern": "layers"}, {}),
    "tied": ({"r": 8, "lora_alpha": 16}, {"tied": True}),
    "sharded": ({"r": 8, "lora_alpha": 16}, {"shards": 3}),
    "bfloat16 base": ({"r": 8, "lora_alpha": 16}, {"dtype": "bfloat16"}),
    "float16 base, tied, sharded": ({"r": 8, "lora_alpha": 16}, {"dtype": "float16", "tied": True, "shards": 2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def logits() -> Callable[[Any], torch.Tensor]:
    tokens = torch.arange(1, 49).view(2, 24)

    def run(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model.eval()(tokens).logits
            return found

    return run


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, base_factory: Any, logits: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    options, shape = CASES[case]
    base = base_factory(**shape)

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **{"target_modules": ALL, **options})
    get_peft_model(load(base.path), config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    unmerged = logits(PeftModel.from_pretrained(load(base.path), tmp_path / "adapter"))

    export_model(tmp_path / "adapter", base, tmp_path / "out", dtype="float32")

    exported = load(tmp_path / "out")
    assert exported.config.dtype == torch.float32
    assert exported.config.tie_word_embeddings == shape.get("tied", False)
    assert float((logits(exported) - unmerged).abs().max()) <= 1e-5
    assert float((logits(load(base.path)) - unmerged).abs().max()) > 1e-3  # and the adapter does something


def test_gpt2(logits: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    from adapterhub.base import find_base

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)).save_pretrained(
        tmp_path / "base"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        init_lora_weights=False,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    unmerged = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))

    result = export_model(tmp_path / "adapter", find_base(str(tmp_path / "base")), tmp_path / "out")

    assert result.merged == 8
    assert float((logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - unmerged).abs().max()) <= 1e-5
