"""Every line of the table of names is what transformers does, and the architectures we promise answer as PEFT does."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_configurations import SHAPE
from safetensors.torch import save_file

from adapterhub import names
from adapterhub.base import find_base
from adapterhub.errors import Unsupported
from adapterhub.export import export_model, plan_export

EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = LINEAR[:4]
# model_type → what its config needs besides, and the modules that are adapted
PROMISED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": ({}, [*LINEAR, "lm_head"]),
    "mistral": ({"sliding_window": None}, LINEAR),
    "qwen2": ({}, LINEAR),
    "qwen3": ({}, LINEAR),
    "gemma": ({}, LINEAR),
    "gemma2": ({"query_pre_attn_scalar": 8}, LINEAR),
    "gemma3_text": ({"query_pre_attn_scalar": 8}, LINEAR),
    "phi3": ({"rope_scaling": None}, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "mixtral": ({"num_local_experts": 4}, [*ATTENTION, "lm_head"]),
    "phimoe": ({"num_local_experts": 4}, ATTENTION),
    "qwen2_moe": ({**EXPERTS, "num_experts": 4}, [*LINEAR, "shared_expert_gate"]),
    "qwen3_moe": ({**EXPERTS, "num_experts": 4}, ATTENTION),
    "gpt_neox": ({}, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head"]),
    "falcon": ({"new_decoder_architecture": True}, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
}


def _adapt(base: Path, to: Path, targets: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, init_lora_weights=False, target_modules=targets)
    get_peft_model(_load(base), config).save_pretrained(to, save_embedding_layers=False)


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(3, 27).view(2, 12)).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROMISED)
def test_logits(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    options, targets = PROMISED[kind]
    torch.manual_seed(0)
    width = {} if kind == "falcon" else {"head_dim": 8}  # Falcon derives it, and lets nobody set it
    config = AutoConfig.for_model(kind, **SHAPE | width | options)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    _adapt(tmp_path / "base", tmp_path / "adapter", targets)
    unmerged = _logits(PeftModel.from_pretrained(_load(tmp_path / "base"), tmp_path / "adapter"))

    export_model(tmp_path / "adapter", find_base(str(tmp_path / "base")), tmp_path / "out")

    assert float((_logits(_load(tmp_path / "out")) - unmerged).abs().max()) <= 1e-5
    assert float((_logits(_load(tmp_path / "base")) - unmerged).abs().max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", ["linear", "head and embedding"])
def test_logits_of_a_multimodal_gemma3(case: str, tmp_path: Path) -> None:
    """Its language model has other names in memory than in a checkpoint, and its config keeps them one level down."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    def load(folder: Path) -> Any:
        return Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = SHAPE | {"head_dim": 8, "query_pre_attn_scalar": 8}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 16, "patch_size": 8})
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    Gemma3ForConditionalGeneration(config).save_pretrained(base)
    targets = r".*language_model.*_proj" if case == "linear" else ["lm_head", "embed_tokens"]
    lora = LoraConfig(task_type="CAUSAL_LM", r=3, init_lora_weights=False, target_modules=targets)
    with warnings.catch_warnings(action="ignore"):  # PEFT warns of tied heads and saved embeddings
        get_peft_model(load(base), lora).save_pretrained(adapter)
        unmerged = _logits(PeftModel.from_pretrained(load(base), adapter))

    export_model(adapter, find_base(str(base)), tmp_path / "out")

    assert float((_logits(load(tmp_path / "out")) - unmerged).abs().max()) <= 1e-5 * max(1, float(unmerged.abs().max()))
    assert float((_logits(load(base)) - unmerged).abs().max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", names.ARCHITECTURES)
def test_the_table_is_what_transformers_does(kind: str) -> None:
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.pytorch_utils import Conv1D

    line = names.ARCHITECTURES[kind]
    model, config = _meta_model(kind)
    modules = dict(model.named_modules())
    assert modules[line.embedding] is model.get_input_embeddings()
    assert modules[line.head] is model.get_output_embeddings()
    assert line.tied == config.tie_word_embeddings
    assert line.conv1d == any(isinstance(module, Conv1D) for module in modules.values())
    checkpoint = revert_weight_conversion(model, dict(model.state_dict()))
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and weight.dim() == 2:
            assert f"{line.stored(name)[0]}.weight" in checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind, line in names.ARCHITECTURES.items() if line.experts])
def test_the_experts_are_what_transformers_has(kind: str) -> None:
    """Their parameters in order, which PEFT's nesting follows, and what a checkpoint makes of them."""
    from transformers.core_model_loading import revert_weight_conversion

    line = names.ARCHITECTURES[kind]
    assert line.experts
    model, _ = _meta_model(kind)
    checkpoint = revert_weight_conversion(model, dict(model.state_dict()))
    found = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    assert found
    for name, module in found.items():
        assert tuple(parameter for parameter, _ in module.named_parameters(recurse=False)) == line.experts.parameters
        assert getattr(module, "is_transposed", False) is line.experts.transposed
        for parameter, parts in line.experts.parts.items():
            stack = getattr(module, parameter)
            if not parts:
                assert checkpoint[line.stored(f"{name}.{parameter}")[0]].shape == stack.shape
            for part in parts:
                tensor = checkpoint[f"{line.stored(name)[0]}.0.{part}.weight"]
                assert tensor.shape == (stack.shape[1] // len(parts), stack.shape[2])


def _meta_model(kind: str) -> tuple[Any, Any]:
    """A model of two layers without storage, else as its config is by default."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind)
    inner = config.get_text_config()
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if hasattr(inner, name):
            setattr(inner, name, 2)
    if getattr(inner, "layer_types", None):
        inner.layer_types = inner.layer_types[:2]
    if getattr(inner, "first_k_dense_replace", 0):  # layers without experts
        inner.first_k_dense_replace = 1
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if getattr(inner, name, None):
            setattr(inner, name, max(2, getattr(inner, "num_experts_per_tok", 2) or 2))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), config


@pytest.mark.parametrize(
    ("kind", "module", "stored"),
    [
        ("gpt_neox", "lm_head", "embed_out"),
        ("gpt2", "transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
        ("mixtral", "model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate", "model.layers.0.block_sparse_moe.gate"),
        ("phimoe", "model.layers.0.mlp.router", "model.layers.0.block_sparse_moe.gate"),
        ("qwen3_moe", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate"),
        ("gemma3", "model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
        ("gemma3", "lm_head", "lm_head"),
        ("qwen2_moe", "model.layers.0.mlp.experts.1.up_proj", "model.layers.0.mlp.experts.1.up_proj"),
    ],
)
def test_names_that_a_module_may_have(kind: str, module: str, stored: str) -> None:
    assert stored in names.architecture({"model_type": kind}).stored(module)


@pytest.mark.parametrize("kind", ["mamba", "my_own", None])
def test_other_architectures_are_refused(kind: str | None, adapter_factory: Any, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": kind}))
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(Unsupported, match=re.escape(f"architecture {kind!a}")):
        plan_export(adapter_factory(), find_base(str(tmp_path / "base")), tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama"}, False),
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({"model_type": "gemma2"}, True),
        ({"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}}, False),
        ({"model_type": "gpt2", "tie_word_embeddings": False}, False),
    ],
)
def test_tied(config: dict[str, Any], expected: bool) -> None:
    assert names.tied(config) is expected
