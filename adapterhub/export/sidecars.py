"""What stands beside the weights: config, tokenizer, chat template, generation config, licence. No torch.

The base's files, except where the adapter brings its own: a tokenizer or a chat template that training used is what the
merged model must be asked with. No `adapter_config.json` is left behind: transformers would go looking for an adapter.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from adapterhub.base import INDEX, SINGLE
from adapterhub.errors import StorageError
from adapterhub.export.plan import Plan

TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"

_TOKENIZER_CONFIG = "tokenizer_config.json"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # one of them makes a tokenizer whole
_TOKENIZER = frozenset(
    {*_VOCABULARIES, _TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "merges.txt", TEMPLATE}
)
_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".py", ".tiktoken"})
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_NEVER = frozenset({"config.json", INDEX, "adapter_config.json", "export.json", "trainer_state.json"})


def write_sidecars(plan: Plan, folder: Path) -> None:
    """Put everything but weights and model card into the folder. Raises OSError, StorageError."""
    for name, source in choose(plan.base.path, plan.adapter.path).items():
        shutil.copyfile(source, folder / name)
    _write_config(plan, folder)
    _write_index(plan, folder)
    _end_where_training_ended(plan.adapter.path, folder)


def choose(base: Path, adapter: Path) -> dict[str, Path]:
    """Name → the file that is copied as it is."""
    chosen = {p.name: p for p in sorted(base.iterdir()) if p.is_file() and _belongs(p)}
    theirs = {p.name: p for p in sorted(adapter.iterdir()) if p.name in _TOKENIZER | {GENERATION} and p.is_file()}
    if _TOKENIZER_CONFIG in theirs and any(name in theirs for name in _VOCABULARIES):  # a whole tokenizer
        keep_template = TEMPLATE not in theirs and "chat_template" not in _read(theirs[_TOKENIZER_CONFIG])
        dropped = _TOKENIZER - {TEMPLATE} if keep_template else _TOKENIZER
        chosen = {name: path for name, path in chosen.items() if name not in dropped}
    return chosen | theirs


def _belongs(path: Path) -> bool:
    if path.name in _NEVER or path.name.startswith(".") or path.name.endswith(".index.json"):
        return False
    return path.suffix in _SUFFIXES or path.name.upper().startswith(_NAMES)


def _write_config(plan: Plan, folder: Path) -> None:
    source = plan.base.path / "config.json"
    if plan.dtype is None and plan.base_precision == "original" and not plan.config:
        shutil.copyfile(source, folder / "config.json")
        return
    config = plan.base.config if plan.base_precision == "original" else unquantised(plan.base.config)
    config = with_changes(config, dict(plan.config))
    _write(folder / "config.json", with_dtype(config, plan.dtype) if plan.dtype else config)


def with_changes(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The config with other values; in a multimodal one they stand in ``text_config``, or in both."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return config | changes
    outer = {key: value for key, value in changes.items() if key in config or key == "tie_word_embeddings"}
    return config | outer | {"text_config": inner | changes}


def unquantised(config: dict[str, Any]) -> dict[str, Any]:
    """The config, its inner ones included, of a model whose weights are no longer quantised."""
    return {
        key: unquantised(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config, its inner ones included, with another dtype; ``torch_dtype`` is what older files call it."""
    inner = {
        key: with_dtype(value, dtype) if isinstance(value, dict) and {"dtype", "torch_dtype"} & value.keys() else value
        for key, value in config.items()
    }
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    return inner | dict.fromkeys(names, dtype)


def _write_index(plan: Plan, folder: Path) -> None:
    if len(plan.files) == 1 and plan.files[0].name == SINGLE:
        return
    old = _read(plan.base.path / INDEX) if plan.base.weight_map is not None else {}
    metadata = {**old.get("metadata", {}), "total_size": sum(op.size for op in plan.operations)}
    weight_map = {part.name: file.name for file in plan.files for op in file.operations for part in op.parts}
    _write(folder / INDEX, {**old, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def _end_where_training_ended(adapter: Path, folder: Path) -> None:
    """Where the adapter's own tokenizer ends a text with a token that the base never ended on, `generate` must know."""
    if not (adapter / _TOKENIZER_CONFIG).is_file() or not (adapter / "tokenizer.json").is_file():
        return
    token = _read(adapter / _TOKENIZER_CONFIG).get("eos_token")
    end = _token_id(_read(adapter / "tokenizer.json"), token["content"] if isinstance(token, dict) else token)
    generation = _read(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    known = generation.get("eos_token_id", _read(folder / "config.json").get("eos_token_id"))
    ends = known if isinstance(known, list) else [known]
    if end is not None and end not in ends:
        _write(folder / GENERATION, generation | {"eos_token_id": [end, *(e for e in ends if e is not None)]})


def _token_id(tokenizer: dict[str, Any], token: str | None) -> int | None:
    added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    found: int | None = added.get(token, vocabulary.get(token) if isinstance(vocabulary, dict) else None)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise StorageError(f"{path} is not JSON", why=str(error), hint="fetch it again") from error
    return data


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
