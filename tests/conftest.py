"""What all tests share: two base models, a maker of adapters, and an environment that touches nobody's home."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[1]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# A shell starts what stands before `&` with Ctrl-C ignored, and what it starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's registry, cache, settings or model cache, nor asks the network."""
    monkeypatch.setenv("AH_HOME", str(tmp_path_factory.mktemp("ah-home")))
    for name in (
        "AH_REGISTRY",
        "AH_CACHE",
        "AH_BASE",
        "AH_AUTHOR",
        "AH_URL",
        "AH_REQUIRE_SIGNED_BY",
        "AH_KEY_PASSWORD",
        "AH_DATABASE_URL",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "AH_REDIS_URL",
        "AH_WEBHOOK_SECRET",
        "AH_API_KEY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def base_dir() -> Path:
    """The small real base: SmolLM2-135M-Instruct, bfloat16, made once."""
    made = subprocess.run([sys.executable, ROOT / "scripts" / "demo_base.py"], check=True, stdout=subprocess.PIPE)
    return Path(made.stdout.decode().strip())


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers in float32, with a byte-level tokenizer and a ChatML template."""
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


def write_tiny_base(path: Path, *, seed: int = 0, hidden: int = 64, tied: bool = False) -> Path:
    """``hidden`` is the width; 2 layers, 4 heads, 2 key-value heads, vocabulary of 260."""
    path.mkdir(parents=True)
    vocabulary = _write_tokenizer(path)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 3,
        "dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config, indent=1))
    rng = np.random.default_rng(seed)
    tensors = {name: _initial(rng, name, shape) for name, shape in llama_shapes(config).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a Llama checkpoint."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (queries, width),
            f"{layer}.self_attn.k_proj.weight": (keys, width),
            f"{layer}.self_attn.v_proj.weight": (keys, width),
            f"{layer}.self_attn.o_proj.weight": (width, queries),
            f"{layer}.mlp.gate_proj.weight": (inner, width),
            f"{layer}.mlp.up_proj.weight": (inner, width),
            f"{layer}.mlp.down_proj.weight": (width, inner),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    shapes["model.norm.weight"] = (width,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return shapes


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Of ana and ben: a private key that signs, and its public key."""
    folder = tmp_path_factory.mktemp("keys")
    return {name: write_key(folder / name, ec.generate_private_key(ec.SECP256R1())) for name in ("ana", "ben")}


def write_key(path: Path, key: Any, *, password: bytes | None = None) -> tuple[Path, Path]:
    """Writes ``path`` with .pem and with .pub."""
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = path.with_suffix(".pem"), path.with_suffix(".pub")
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(pem, pkcs8, locked))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="session")
def key_writer() -> Callable[..., tuple[Path, Path]]:
    """`write_key`."""
    return write_key


AdapterFactory = Callable[..., Path]


@pytest.fixture
def adapter_factory(tmp_path: Path, tiny_base: Path) -> AdapterFactory:
    """Makes random PEFT adapter directories: ``adapter_factory("name", rank=4, seed=1, base=tiny_base)``."""

    def make(name: str = "adapter", *, base: Path | None = None, **options: Any) -> Path:
        return write_adapter(tmp_path / name, base=base or tiny_base, **options)

    return make


@pytest.fixture(scope="session")
def adapter_writer() -> AdapterFactory:
    """`write_adapter`, for fixtures that outlive a test: ``adapter_writer(path, base=tiny_base)``."""
    return write_adapter


def write_adapter(
    path: Path,
    *,
    base: Path,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    scale: float = 0.05,
    targets: Iterable[str] = LINEAR,
    dtype: str = "float32",
    config: dict[str, Any] | None = None,
) -> Path:
    """A random adapter for a Llama-shaped base, as PEFT saves it. ``scale`` is the standard deviation of A and B."""
    path.mkdir(parents=True, exist_ok=True)
    targets = sorted(targets)
    shapes = llama_shapes(json.loads((base / "config.json").read_text()))
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in targets:
            out, width = shape
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = rng.normal(0, scale, (rank, width)).astype(dtype)
            tensors[f"{prefix}.lora_B.weight"] = rng.normal(0, scale, (out, rank)).astype(dtype)
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    (path / "adapter_config.json").write_text(json.dumps(written | (config or {}), indent=1))
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def _initial(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    if "norm" in name:
        return np.ones(shape, dtype=np.float32)
    return rng.normal(0, 0.08, shape).astype(np.float32)


def _write_tokenizer(path: Path) -> int:
    """A tokenizer with one token a byte and three special tokens; returns the size of the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|unused|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (path / "chat_template.jinja").write_text(CHATML)
    return tokenizer.get_vocab_size()


class Collector:
    """An OTLP collector over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        collector = self

        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                for resource in sent.resource_spans:
                    names = [a.value.string_value for a in resource.resource.attributes if a.key == "service.name"]
                    collector.services.update(names)
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="session")
def collector_of_all() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture
def collector(collector_of_all: Collector) -> Collector:
    """Without what others sent before."""
    collector_of_all.spans.clear()
    collector_of_all.services.clear()
    return collector_of_all
