"""GGUF files read back: by the gguf package, by transformers, and by llama.cpp itself where that is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file

from adapterhub.export.gguf_names import architecture, hyperparameters, rope_factors

PATTERNS = {"use_rslora": True, "alpha_pattern": {"q_proj": 24, "layers.1.mlp.up_proj": 2}}


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """Metadata, values and types of a GGUF file."""
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    values = {t.name: np.array(dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return fields, values, {t.name: t.tensor_type.name.lower() for t in reader.tensors}


def configure(folder: Path, name: str = "config.json", **changes: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_model_of_every_type(base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path) -> None:
    base, adapter = base_factory(dtype="bfloat16", shards=2), adapter_factory(config=PATTERNS)
    words = (adapter, "--base", base.path, "--format", "gguf")
    assert ah("export", adapter, "--base", base.path, "--to", tmp_path / "m", "--dtype", "float32").code == 0
    exact = {n: t for f in (tmp_path / "m").glob("*.safetensors") for n, t in load_file(f).items()}
    for kind, most in (("f32", 0), ("bf16", 2**-8), ("f16", 2**-11), ("q8_0", 1 / 127)):
        ran = ah("export", *words, "--gguf-type", kind, "--to", tmp_path / f"{kind}.gguf", "--json")
        assert ran.code == 0, ran.err
        told, (_, values, types) = json.loads(ran.out), read(tmp_path / f"{kind}.gguf")
        assert told["tensors"] == len(values) == len(exact)
        assert types["blk.0.ffn_up.weight"] == kind
        assert types["blk.0.attn_norm.weight"] == "f32"
        want = exact["model.layers.0.mlp.up_proj.weight"].numpy()
        assert float(np.abs(values["blk.0.ffn_up.weight"] - want).max()) <= most * float(np.abs(want).max())
    assert [p.name for p in tmp_path.glob(".*.gguf*")] == []


def test_rows_that_q8_0_cannot_divide_stay_wider(tmp_path: Path, tiny_base: Path, adapter_writer: Any, ah: Any) -> None:
    base = tmp_path / "narrow"
    copy_tokenizer(tiny_base, base)
    make_model("llama", base, hidden_size=48, head_dim=12)
    adapter = adapter_writer(tmp_path / "a", base=base)
    to = tmp_path / "q.gguf"
    ran = ah("export", adapter, "--base", base, "--format", "gguf", "--gguf-type", "q8_0", "--to", to)
    assert ran.code == 0, ran.err
    _, _, types = read(to)
    assert (types["blk.0.ffn_up.weight"], types["blk.0.ffn_down.weight"]) == ("f16", "q8_0")


def test_a_lora_is_the_difference_of_the_models(
    base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path
) -> None:
    """alpha / rank · B·A, as llama.cpp computes it, in llama.cpp's order of the rows."""
    base, adapter = base_factory(), adapter_factory(rank=4, config=PATTERNS)
    narrow(adapter, "model.layers.0.self_attn.k_proj", rank=2)
    zero = adapter_factory("zero", scale=0.0)
    made = {"base": (zero, "gguf"), "model": (adapter, "gguf"), "lora": (adapter, "gguf-lora")}
    for name, (what, form) in made.items():
        to = tmp_path / f"{name}.gguf"
        ran = ah("export", what, "--base", base.path, "--to", to, "--format", form, "--gguf-type", "f32")
        assert ran.code == 0, ran.err
    (_, before, _), (_, after, _) = read(tmp_path / "base.gguf"), read(tmp_path / "model.gguf")
    fields, factors, _ = read(tmp_path / "lora.gguf")
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    changed = 0
    for name, weight in after.items():
        if f"{name}.lora_a" not in factors:
            assert np.array_equal(weight, before[name])
            continue
        a, b = factors[f"{name}.lora_a"].astype(float), factors[f"{name}.lora_b"].astype(float)
        delta = fields["adapter.lora.alpha"] / a.shape[0] * (b @ a)
        assert float(np.abs(weight - before[name] - delta).max()) < 1e-6
        assert float(np.abs(delta).max()) > 1e-3
        changed += 1
    assert changed == 14


def narrow(adapter: Path, module: str, *, rank: int) -> None:
    """One module of a smaller rank."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for half in ("A", "B"):
        name = f"base_model.model.{module}.lora_{half}.weight"
        tensors[name] = (tensors[name][:rank] if half == "A" else tensors[name][:, :rank]).contiguous()
    save_file(tensors, file)
    configure(adapter, "adapter_config.json", rank_pattern={module.replace(".", r"\."): rank})


def test_what_llama_cpp_must_know(base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path) -> None:
    base, to = base_factory(tied=True), tmp_path / "m.gguf"
    ran = ah("export", adapter_factory(), "--base", base.path, "--to", to, "--format", "gguf")
    assert ran.code == 0, ran.err
    fields, values, _ = read(to)
    assert "output.weight" not in values
    assert fields["general.architecture"] == "llama"
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (4, 2)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.tokens"][-1] == "<|im_end|>"
    assert fields["tokenizer.ggml.eos_token_id"] == 259
    assert fields["tokenizer.ggml.padding_token_id"] == 257
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert list(fields["tokenizer.ggml.token_type"])[255:] == [1, 3, 3, 3, 3]
    assert "<|im_start|>" in fields["tokenizer.chat_template"]


def copy_tokenizer(tiny_base: Path, to: Path) -> None:
    to.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (to / name).write_bytes((tiny_base / name).read_bytes())


def make_model(kind: str, folder: Path, **settings: Any) -> None:
    """A tiny random model of a family, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 260, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ends = {"pad_token_id": 257, "bos_token_id": None, "eos_token_id": 259, "tie_word_embeddings": False}
    config = AutoConfig.for_model(kind, **(sizes | heads | ends | settings))
    model = AutoModelForCausalLM.from_config(config).float()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # random starts leave them at 1 and 0, where a mix-up hides
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(folder)


GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 32, "head_dim": 32, "tie_word_embeddings": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),  # transformers reads no other
        ("gemma2", GEMMA),
        ("gemma3_text", GEMMA),
    ],
)
def test_transformers_reads_the_same_model(
    kind: str, settings: Any, tiny_base: Path, adapter_writer: Any, ah: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    base, to = tmp_path / "base", tmp_path / "out" / "m.gguf"
    copy_tokenizer(tiny_base, base)
    make_model(kind, base, **settings)
    adapter = adapter_writer(tmp_path / "adapter", base=base, scale=0.2, config=PATTERNS)
    assert ah("export", adapter, "--base", base, "--to", tmp_path / "merged").code == 0
    ran = ah("export", adapter, "--base", base, "--to", to, "--format", "gguf", "--gguf-type", "f32")
    assert ran.code == 0, ran.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    options: dict[str, Any] = {
        "gguf_file": to.name,
        "dtype": torch.float32,
        "quantization_config": GgufConfig(dequantize=True),
    }
    if settings.keys() & {"attention_bias", "query_pre_attn_scalar"}:  # transformers does not see these in the file
        options["config"] = merged.config
    back = AutoModelForCausalLM.from_pretrained(to.parent, **options)
    tokens = torch.arange(4, 68).view(2, 32)
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, back(tokens).logits, atol=1e-5)


def test_llama_3_scaling_is_that_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=scaling)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    factors = rope_factors(architecture(config.to_dict()))
    assert factors is not None
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    assert np.allclose(plain / factors, wanted.numpy(), rtol=1e-5)


def test_linear_scaling_and_windows_are_told(tiny_base: Path) -> None:
    config = json.loads((tiny_base / "config.json").read_text())
    linear = hyperparameters(architecture(config | {"rope_scaling": {"type": "linear", "factor": 4.0}}))
    assert (linear["rope.scaling.type"], linear["rope.scaling.factor"]) == ("linear", 4.0)
    assert hyperparameters(architecture(config | {"sliding_window": 64}))["context_length"] == 512
    mistral = config | {"model_type": "mistral", "sliding_window": 64}
    assert hyperparameters(architecture(mistral))["context_length"] == 64


def test_bad_input(base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path) -> None:
    base, adapter, to = base_factory(), adapter_factory(), tmp_path / "m.gguf"
    config, tokenizer = base.path / "config.json", base.path / "tokenizer.json"
    was = {file: file.read_text() for file in (config, tokenizer)}

    def why(*words: object, form: str = "gguf", to: Path = to) -> str:
        ran = ah("export", adapter, "--base", base.path, "--to", to, "--format", form, *words)
        assert ran.code == 2
        assert not list(tmp_path.glob("*.gguf*")) + list(tmp_path.glob(".*.gguf*"))
        for file, text in was.items():
            file.write_text(text)
        return str(ran.err)

    assert "--gguf-type f32" in why("--dtype", "float32")
    assert "--plan" in why("--plan")
    assert "--resume" in why("--resume")
    assert "q8_0" in why("--gguf-type", "q8_0", form="gguf-lora")
    assert "m.gguf" in why(to=tmp_path / "m")
    assert "--format gguf" in ah("export", adapter, "--base", base.path, "--to", to, "--gguf-type", "f32").err
    configure(base.path, model_type="gemma4")
    assert "gemma4" in why()
    gemma = {"model_type": "gemma3_text", "hidden_act": None, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 16}
    gemma |= {"tie_word_embeddings": True, "query_pre_attn_scalar": 16}
    changes: dict[str, dict[str, Any]] = {
        "activation": {"hidden_activation": "silu"},
        "look": {"use_bidirectional_attention": True},
        "head": {"tie_word_embeddings": False},
        "capped": {"final_logit_softcapping": 30.0},
        "window": {"layer_types": ["full_attention", "sliding_attention"]},
        "divided": {"query_pre_attn_scalar": 24},
        "rotate": {"rope_local_base_freq": 5000.0},
    }
    for word, change in changes.items():
        configure(base.path, **gemma | change)
        assert word in why()
    configure(base.path, **gemma | {"model_type": "gemma2"})
    assert "capped by nothing" in why()
    configure(base.path, hidden_act="gelu")
    assert "gelu" in why()
    configure(base.path, rope_scaling={"type": "yarn", "factor": 4.0})
    assert "yarn" in why()
    configure(base.path, "tokenizer.json", normalizer={"type": "Lowercase"})
    assert "Lowercase" in why()
    configure(base.path, "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    assert "Whitespace" in why()
    configure(base.path, "tokenizer.json", model=json.loads(was[tokenizer])["model"] | {"byte_fallback": True})
    assert "SentencePiece" in why()
    configure(adapter, "adapter_config.json", modules_to_save=["lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    head = {"base_model.model.lm_head.weight": torch.zeros(260, 64)}
    save_file(tensors | head, adapter / "adapter_model.safetensors")
    assert "lm_head" in why(form="gguf-lora")


def test_an_existing_file_stays(base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path) -> None:
    to = tmp_path / "m.gguf"
    to.write_text("mine")
    ran = ah("export", adapter_factory(), "--base", base_factory().path, "--to", to, "--format", "gguf")
    assert ran.code == 2
    assert "exists" in ran.err
    assert to.read_text() == "mine"


def test_a_value_beyond_float16_is_refused(base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path) -> None:
    base, to = base_factory(), tmp_path / "m.gguf"
    tensors = load_file(base.path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, base.path / "model.safetensors", metadata={"format": "pt"})
    ran = ah("export", adapter_factory(), "--base", base.path, "--to", to, "--format", "gguf")
    assert ran.code == 2
    assert "bf16" in ran.err
    assert not list(tmp_path.glob("*.gguf*")) + list(tmp_path.glob(".*.gguf*"))


PREDICT = """
import json, sys, urllib.request
import xllamacpp
for file in sys.argv[1:]:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = file, 256, False
    server = xllamacpp.Server(params)
    body = {"prompt": list(range(4, 40)), "n_predict": 1, "temperature": 0, "n_probs": 20}
    body["logit_bias"] = [[i, False] for i in range(94, 260)]  # of half a character it tells no probabilities
    kind = {"content-type": "application/json"}
    request = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode(), kind)
    answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
    top = answer["completion_probabilities"][0]["top_logprobs"]
    print("found:" + json.dumps([[entry["id"], entry["logprob"]] for entry in top]), flush=True)
"""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {**GEMMA, "query_pre_attn_scalar": None},
    "gemma2": {**GEMMA, "sliding_window": 8},
    "gemma3_text": {**GEMMA, "sliding_window": 8, "num_hidden_layers": 7},
}


@pytest.mark.slow
def test_llama_cpp_computes_every_family(tiny_base: Path, adapter_writer: Any, ah: Any, tmp_path: Path) -> None:
    """The likeliest next tokens of a random model: its own rotation, norms, windows and caps; its gelu is a table."""
    pytest.importorskip("xllamacpp")
    from transformers import AutoModelForCausalLM

    wanted, files = [], []
    for kind, settings in FAMILIES.items():
        base, to = tmp_path / kind, tmp_path / f"{kind}.gguf"
        copy_tokenizer(tiny_base, base)
        words = json.loads((base / "tokenizer.json").read_text())["model"]
        configure(base, "tokenizer.json", model=words | {"merges": ["a b"]})  # llama.cpp wants one; nothing is split
        make_model(kind, base, **settings)
        adapter = adapter_writer(tmp_path / f"{kind}-adapter", base=base, scale=0.2)
        assert ah("export", adapter, "--base", base, "--to", tmp_path / f"{kind}-merged").code == 0
        ran = ah("export", adapter, "--base", base, "--to", to, "--format", "gguf", "--gguf-type", "f32")
        assert ran.code == 0, ran.err
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-merged", dtype=torch.float32)
        with torch.no_grad():
            wanted.append(model(torch.arange(4, 40)[None]).logits[0, -1].log_softmax(-1))
        files.append(str(to))
    ran = subprocess.run([sys.executable, "-c", PREDICT, *files], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [line.removeprefix("found:") for line in ran.stdout.splitlines() if line.startswith("found:")]
    errors = {
        kind: max(abs(logprob - float(expected[token])) for token, logprob in json.loads(line))
        for kind, line, expected in zip(FAMILIES, lines, wanted, strict=True)
    }
    assert all(error < 0.01 for error in errors.values()), errors


LLAMA_CPP = """
import sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = sys.argv[1], 256, False
if len(sys.argv) > 2:
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = sys.argv[2], 1.0
    params.lora_adapters = [lora]
request = {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}
print("said:" + repr(xllamacpp.Server(params).handle_completions(request)["choices"][0]["text"]))
"""


@pytest.mark.slow
def test_llama_cpp_says_the_same(base_dir: Path, adapter_writer: Any, ah: Any, tmp_path: Path) -> None:
    """Its own loader, tokenizer and arithmetic: the merged model, and the base with the LoRA file."""
    pytest.importorskip("xllamacpp")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = adapter_writer(tmp_path / "adapter", base=base_dir, rank=8, alpha=16, scale=0.02, config=PATTERNS)
    zero = adapter_writer(tmp_path / "zero", base=base_dir, rank=1, scale=0.0)
    made = {"model": (adapter, "gguf"), "base": (zero, "gguf"), "lora": (adapter, "gguf-lora")}
    for name, (what, form) in made.items():
        to = tmp_path / f"{name}.gguf"
        ran = ah("export", what, "--base", base_dir, "--to", to, "--format", form, "--gguf-type", "f32")
        assert ran.code == 0, ran.err
    assert ah("export", adapter, "--base", base_dir, "--to", tmp_path / "m", "--dtype", "float32").code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    asked = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=16, do_sample=False)[0][asked.input_ids.shape[1] :]
    wanted = "said:" + repr(tokenizer.decode(answer, skip_special_tokens=True))

    def say(*files: str) -> str:
        words = [sys.executable, "-c", LLAMA_CPP, *(str(tmp_path / f"{name}.gguf") for name in files)]
        ran = subprocess.run(words, check=True, capture_output=True, text=True, timeout=300)
        return next(line for line in ran.stdout.splitlines() if line.startswith("said:"))

    assert say("model") == wanted
    assert say("base", "lora") == wanted
    assert say("base") != wanted


def test_a_head_that_is_no_longer_the_embedding(
    base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path
) -> None:
    """LoRA on a tied head leaves the embedding: the file must hold both."""
    base, adapter = base_factory(tied=True), adapter_factory(targets=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    head = {"A": torch.randn(4, 64) * 0.1, "B": torch.randn(260, 4) * 0.1}
    factors = {f"base_model.model.lm_head.lora_{half}.weight": factor for half, factor in head.items()}
    save_file(load_file(file) | factors, file)
    configure(adapter, "adapter_config.json", target_modules=["q_proj", "lm_head"])
    words = ("export", adapter, "--base", base.path)
    assert ah(*words, "--to", tmp_path / "m", "--dtype", "float32").code == 0
    ran = ah(*words, "--to", tmp_path / "m.gguf", "--format", "gguf", "--gguf-type", "f32")
    assert ran.code == 0, ran.err
    merged, (_, values, _) = load_file(tmp_path / "m" / "model.safetensors"), read(tmp_path / "m.gguf")
    assert np.array_equal(values["output.weight"], merged["lm_head.weight"].numpy())
    assert np.array_equal(values["token_embd.weight"], merged["model.embed_tokens.weight"].numpy())
    ran = ah(*words, "--to", tmp_path / "lora.gguf", "--format", "gguf-lora")
    assert ran.code == 2
    assert "--format gguf" in ran.err
