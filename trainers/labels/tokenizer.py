"""The tokenizer and the chat template of a training: the base's own, or what the config puts in their place.

Serving renders with the adapter's template and the *base's* tokenizer. What would make another text there than in
training is refused here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapterhub.base import BaseModel
from adapterhub.errors import ConfigError, MissingDependency, NotFound
from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.labels import templates

_SPECIAL = ("pad_token", "eos_token", "bos_token", "unk_token")
_PROBE = [{"role": "user", "content": "Where is my parcel?"}, {"role": "assistant", "content": "On its way."}]


def load_tokenizer(base: BaseModel, config: TrainConfig) -> Any:
    """The base's tokenizer, or that of ``tokenizer_config`` with the same words; with the config's special tokens.

    Raises:
        MissingDependency: the ``train`` extra is not installed.
        NotFound: there is no tokenizer that can be read.
        ConfigError: a token that the base does not have, or another vocabulary.
    """
    tokenizer = _read(str(base.path), f"the base {base.name}", config)
    vocabulary = tokenizer.get_vocab()
    if config.tokenizer_config:
        tokenizer = _read(str(Path(config.tokenizer_config).expanduser()), config.tokenizer_config, config)
        if tokenizer.get_vocab() != vocabulary:
            raise ConfigError(
                f"tokenizer_config: {config.tokenizer_config} has other words than the base {base.name}",
                why="the base is served with its own tokenizer, so its ids would mean other text",
                hint="take tokenizer_config out, or name a base that has this tokenizer",
            )
    for key, token in config.special_tokens.items():
        if key not in _SPECIAL:
            raise ConfigError(f"special_tokens: {key!a} is not a special token", why="expects " + ", ".join(_SPECIAL))
        if token not in vocabulary:
            raise _new_token("special_tokens", base, token)
        setattr(tokenizer, key, token)
    for token in config.eot_tokens:
        if token not in vocabulary:
            raise _new_token("eot_tokens", base, token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def generation_ends(base: BaseModel) -> list[int]:
    """Ids of the tokens at which generation stops, from the base's own files."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = base.path / name
        if file.is_file():
            found = json.loads(file.read_bytes()).get("eos_token_id")
            ids += found if isinstance(found, list) else [found] if isinstance(found, int) else []
    return ids


def served_end(base: BaseModel, config: TrainConfig, tokenizer: Any) -> int | None:
    """Id of the end of sequence of the tokenizer that serving has: the base's own."""
    changed = config.tokenizer_config or "eos_token" in config.special_tokens
    plain = _read(str(base.path), f"the base {base.name}", config) if changed else tokenizer
    found: int | None = plain.eos_token_id
    return found


def template_of(config: TrainConfig, tokenizer: Any, beside: Path | None) -> str | None:
    """The text of the chat template; None where the tokenizer has none and none is named.

    Raises ConfigError: its file cannot be read, or the base lacks one of its tokens.
    """
    name, own = config.chat_template, _own(tokenizer)
    if name == templates.JINJA:
        return _written(config.chat_template_jinja or "", beside)
    if name.startswith(templates.FALLBACK):
        if own is not None:
            return own
        name = name.removeprefix(templates.FALLBACK)
    if name not in templates.NAMED:
        return own
    template = templates.NAMED[name]
    missing = [token for token in template.tokens if token not in tokenizer.get_vocab()]
    if missing:
        raise ConfigError(
            f"chat_template: the base has no token {missing[0]} for {name}",
            why="a new token needs a trained embedding, which the serving engine does not take",
            hint="take chat_template out to use the tokenizer's own, or write one with tokens that the base has: "
            "chat_template: jinja",
        )
    return template.text


def _own(tokenizer: Any) -> str | None:
    template: str | dict[str, str] | None = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def check_served_alike(base: BaseModel, config: TrainConfig, tokenizer: Any, template: str) -> None:
    """Serving has the base's tokenizer, not the config's special tokens: the same template must give the same text.

    Raises ConfigError where it does not.
    """
    if not config.special_tokens and not config.tokenizer_config:
        return
    plain = _read(str(base.path), f"the base {base.name}", config)
    if _rendered(tokenizer, template) == _rendered(plain, template):
        return
    keys = ("bos_token", "eos_token", "unk_token")
    key = next((k for k in keys if k in template and getattr(tokenizer, k) != getattr(plain, k)), "a special token")
    trained, served = getattr(tokenizer, key, "another"), getattr(plain, key, "the base's own")
    raise ConfigError(
        f"special_tokens: the chat template writes {key}, which is {trained} in training and {served} in serving",
        why="serving renders with the base's own tokenizer, so the adapter would not see what it learnt",
        hint=f"write {trained} itself where the template writes {key}: chat_template: jinja",
    )


def _rendered(tokenizer: Any, template: str) -> str:
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(_PROBE, chat_template=template, tokenize=False))
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError):
        return ""  # the rows themselves will tell


def _read(path: str, what: str, config: TrainConfig) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependency(
            "training needs transformers", why=str(error), hint='pip install "adapterhub[train]"'
        ) from error
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise NotFound(
            f"{what} has no tokenizer that can be read",
            why=str(error).strip().splitlines()[0],
            hint=f"put the tokenizer's files beside its weights: ls {path}",
        ) from error


def _new_token(key: str, base: BaseModel, token: str) -> ConfigError:
    return ConfigError(
        f"{key}: the base {base.name} has no token {token!a}",
        why="a new token needs a trained embedding, which the serving engine does not take",
        hint="name a token of the base's own vocabulary",
    )


def _written(written: str, beside: Path | None) -> str:
    """A template as it stands in the config, or the file that it names."""
    if "\n" in written or "{" in written:
        return written
    try:
        near = beside / written if beside else Path(written)
        return (near if near.is_file() else Path(written)).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"chat_template_jinja: {written} cannot be read", why=str(error.strerror)) from error
