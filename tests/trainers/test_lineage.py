"""A version's config says nothing of the machine that trained it, and enough to find its data again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.errors import DataError
from adapterhub.trainers import DataSource, Prepared, TrainConfig, prepare, read_config, read_yaml
from adapterhub.trainers.lineage import at_hand, portable

Writer = Callable[..., Path]


@pytest.fixture
def prepared(write_config: Writer) -> Prepared:
    path = write_config()
    return prepare(read_config(read_yaml(path)).config, beside={"datasets": path.parent})


def trained_on(prepared: Prepared, path: str, found: Path) -> TrainConfig:
    """The portable config of the same training on data from elsewhere."""
    (file,) = prepared.train.files
    config = replace(prepared.config, datasets=(DataSource(path=path),))
    return portable(replace(prepared, config=config, train=replace(prepared.train, files=(replace(file, path=found),))))


def sources(config: TrainConfig, *data: Path) -> list[str]:
    found = at_hand(config, base="b", data=data, output_dir=Path("out"))
    return [source.path for source in found.datasets]


def test_a_local_file_is_known_by_its_name(prepared: Prepared, tmp_path: Path) -> None:
    config = trained_on(prepared, str(tmp_path / "train.jsonl"), tmp_path / "train.jsonl")
    assert config.datasets[0].path == "train.jsonl"
    assert str(tmp_path) not in config.to_yaml()
    assert sources(config, tmp_path) == [str(tmp_path / "train.jsonl")]
    with pytest.raises(DataError, match=r"train\.jsonl is not among those given"):
        sources(config)


@pytest.mark.parametrize(
    ("path", "found"),
    [("s3://bucket/sets/train.jsonl", "train.jsonl"), ("tatsu-lab/alpaca", "tatsu-lab/alpaca")],
)
def test_what_is_on_s3_or_the_hub_keeps_its_address(prepared: Prepared, tmp_path: Path, path: str, found: str) -> None:
    at = tmp_path / found if path.startswith("s3://") else Path(found)  # the copy that was downloaded, or no file
    config = trained_on(prepared, path, at)
    assert config.datasets[0].path == path
    assert sources(config) == [path]


def test_a_file_at_hand_wins_over_its_address(prepared: Prepared, tmp_path: Path) -> None:
    config = trained_on(prepared, "s3://bucket/train.jsonl", tmp_path / "train.jsonl")
    assert sources(config, tmp_path) == [str(tmp_path / "train.jsonl")]


def test_a_tokenizer_from_elsewhere_leaves_what_it_changed(write_config: Writer, tiny_base: Path) -> None:
    path = write_config(tokenizer_config=str(tiny_base), special_tokens={"pad_token": "<|im_start|>"})
    prepared = prepare(read_config(read_yaml(path)).config, beside={"datasets": path.parent})
    config = portable(prepared)
    assert config.tokenizer_config is None
    assert config.special_tokens == {"pad_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert (config.chat_template, config.chat_template_jinja) == ("jinja", prepared.template)
    assert str(tiny_base) not in config.to_yaml()
