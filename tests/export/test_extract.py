"""A tuned model back to an adapter: exact where the difference has the rank, near where not, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub import peftdir
from adapterhub.export.extract import low_rank
from adapterhub.export.tuned import FAMILIES, rope
from adapterhub.registry.drafts import draft


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    adapter, tensors = peftdir.read(folder), load_file(folder / "adapter_model.safetensors")
    return {f.module: f.scale * tensors[f.b.name].double() @ tensors[f.a.name].double() for f in adapter.factors}


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite some tensors of a model folder, ``__`` for a dot; None takes one out."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if value is not None:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_an_exported_adapter_comes_back(adapter_factory: Any, base_factory: Any, ah: Any, tmp_path: Path) -> None:
    base, adapter = base_factory(), adapter_factory(rank=4, config={"use_rslora": True})
    assert ah("export", adapter, "--base", base.path, "--to", tmp_path / "tuned").code == 0
    words = ("--base", base.path, "--tuned", tmp_path / "tuned", "--rank", "4", "--to", tmp_path / "back", "--json")
    ran = ah("extract", *words)
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["error"] < 1e-4
    assert not told["lost"]
    want, made = deltas(adapter), deltas(tmp_path / "back" / "adapter")
    assert made.keys() == want.keys()
    for module, delta in want.items():
        assert float((made[module] - delta).norm() / delta.norm()) < 1e-4
    kept = json.loads((tmp_path / "back" / "adapter" / "extract.json").read_text())
    assert kept["errors"] == told["errors"]


def test_it_is_published_and_merged_again(adapter_factory: Any, base_factory: Any, ah: Any, tmp_path: Path) -> None:
    base, tuned, back = base_factory(), tmp_path / "tuned", tmp_path / "back"
    assert ah("export", adapter_factory(rank=4), "--base", base.path, "--to", tuned).code == 0
    assert ah("extract", "--base", base.path, "--tuned", tuned, "--rank", "4", "--to", back).code == 0
    made = draft(back, base=base)
    assert made.verdicts.serve.answer == "yes"
    assert made.manifest.lineage.method == "extract"
    assert ah("publish", back, "--name", "acme/back").code == 0
    assert ah("export", "acme/back", "--base", base.path, "--to", tmp_path / "again").code == 0
    one, two = (load_file(folder / "model.safetensors") for folder in (tuned, tmp_path / "again"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_subspace_iteration_is_nearly_the_best_of_its_rank() -> None:
    torch.manual_seed(0)
    spectrum = torch.arange(1, 301).double() ** -0.5  # falls slowly, as a full tuning's does
    u, v = (torch.linalg.qr(torch.randn(n, 300, dtype=torch.float64)).Q for n in (400, 500))
    whole = ((u * spectrum) @ v.T).float()
    a, b, rest = low_rank(whole, 8)
    assert (a.shape, b.shape) == ((8, 500), (400, 8))
    assert rest == pytest.approx(float((whole.double() - b.double() @ a.double()).norm()), rel=1e-4)
    assert rest / float(spectrum[8:].norm()) == pytest.approx(1, abs=2e-3)


def test_what_lora_cannot_hold_is_told(base_factory: Any, ah: Any, tmp_path: Path) -> None:
    base, tuned = base_factory(), base_factory("tuned")
    tensors = load_file(tuned.path / "model.safetensors")
    change(
        tuned.path,
        model__norm__weight=tensors["model.norm.weight"] * 1.5,
        model__embed_tokens__weight=tensors["model.embed_tokens.weight"] * 1.01,
        model__layers__1__mlp__up_proj__weight=tensors["model.layers.1.mlp.up_proj.weight"] * 1.1,
    )
    ran = ah("extract", "--base", base.path, "--tuned", tuned.path, "--rank", "2", "--to", tmp_path / "a")
    assert ran.code == 0
    assert "2 tensors changed that LoRA cannot hold" in ran.err
    told = json.loads((tmp_path / "a" / "adapter" / "extract.json").read_text())
    assert told["lost"]["model.norm.weight"] == pytest.approx(1 / 3, rel=1e-3)
    assert told["lost"]["model.embed_tokens.weight"] == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert 0.5 < told["errors"]["model.layers.1.mlp.up_proj"] < 1
    assert "model.norm.weight" in (tmp_path / "a" / "adapter" / "README.md").read_text()
    change(tuned.path, model__layers__1__mlp__up_proj__weight=tensors["model.layers.1.mlp.up_proj.weight"])
    ran = ah("extract", "--base", base.path, "--tuned", tuned.path, "--to", tmp_path / "b")
    assert ran.code == 2
    assert "2 other tensors differ" in ran.err


def test_two_dtypes_and_a_tied_head_that_one_of_them_stores(base_factory: Any, ah: Any, tmp_path: Path) -> None:
    base, tuned = base_factory(dtype="bfloat16", tied=True), base_factory("tuned", tied=True)
    tensors = load_file(tuned.path / "model.safetensors")
    bf16 = load_file(base.path / "model.safetensors")
    moved = {name.replace(".", "__"): bf16[name].float() for name in bf16}
    moved["model__layers__0__mlp__up_proj__weight"] += 0.1
    change(tuned.path, lm_head__weight=tensors["model.embed_tokens.weight"].clone(), **moved)
    ran = ah("extract", "--base", base.path, "--tuned", tuned.path, "--rank", "1", "--to", tmp_path / "a", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert set(told["ranks"]) == {"model.layers.0.mlp.up_proj"}
    assert told["error"] < 1e-5
    assert not told["lost"]


def test_bad_input(base_factory: Any, ah: Any, tmp_path: Path) -> None:
    base, tuned, to = base_factory(), base_factory("tuned"), tmp_path / "out"

    def why(*words: object) -> str:
        ran = ah("extract", "--base", base.path, "--tuned", tuned.path, "--to", to, *words)
        assert ran.code == 2
        assert not to.exists()
        return str(ran.err)

    assert "all tensors are equal" in why()
    assert "rank 0" in why("--rank", "0")
    assert "exists" in ah("extract", "--base", base.path, "--tuned", tuned.path, "--to", base.path).err
    assert "needs the base" in ah("extract", "--tuned", tuned.path, "--to", to).err
    up = "model__layers__0__mlp__up_proj__weight"
    old = load_file(tuned.path / "model.safetensors")
    change(tuned.path, **{up: torch.full((128, 64), torch.nan)})
    assert "NaN" in why()
    change(tuned.path, **{up: torch.ones(128, 32)})
    assert "[128, 32]" in why()
    change(tuned.path, **{up: None})
    assert "is in base and not in tuned" in why()
    change(tuned.path, **{up: torch.ones(128, 64).to(torch.float64)})
    assert "F64" in why()
    embedding = old["model.embed_tokens.weight"]
    change(tuned.path, **{up: torch.ones(128, 64)}, model__embed_tokens__weight=torch.cat([embedding, embedding[:4]]))
    assert "adds no tokens" in why()
    change(tuned.path, model__embed_tokens__weight=embedding)
    configure(tuned.path, num_attention_heads=8)
    assert "num_attention_heads" in why()
    configure(tuned.path, num_attention_heads=4, rope_scaling={"type": "linear", "factor": 2.0})
    assert "rotary" in why()
    configure(tuned.path, rope_scaling=None, quantization_config={"quant_method": "gptq"})
    assert "gptq" in why()
    configure(tuned.path, quantization_config=None, model_type="mistral")
    assert "one is llama" in why()
    configure(tuned.path, model_type="gpt2")
    configure(base.path, model_type="gpt2")
    assert "gpt2" in why()


def test_rotary_settings_of_two_generations_are_the_same() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    assert rope(old) == rope(new)
    assert rope({}) == {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_checkpoints_of_the_families_name_their_layers(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **heads, **ends))
    model.save_pretrained(tmp_path)
    layers = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)} - {"lm_head"}
    stored = {name for name in load_file(tmp_path / "model.safetensors") if name.endswith("_proj.weight")}
    assert {name.removesuffix(".weight") for name in stored} == layers
