"""Going on from an adapter, DoRA, and initial values that change the base."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapterhub import peftdir
from adapterhub.errors import AdapterError, BaseMismatch, ConfigError, NotFound
from adapterhub.trainers import (
    Interrupted,
    read_run,
    resume,
    train,
)
from adapterhub.trainers.events import Event, Step
from tests.trainers.conftest import PAIRS, begin, trained

Writer = Callable[..., Path]
Factory = Callable[..., Path]
Ah = Callable[..., Any]


def losses(folder: Path) -> list[float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in found if "loss" in line]


def weights(adapter: Path) -> dict[str, Any]:
    return dict(load_file(adapter / "adapter_model.safetensors"))


def logits(base: Path, adapter: Path | None = None) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40)[None]).logits


# ── before a model is loaded ──


def test_the_adapter_s_shape_wins(write_config: Writer, adapter_factory: Factory) -> None:
    folder = adapter_factory("old", rank=2, alpha=6, targets=("q_proj", "up_proj"))
    _, prepared = begin(write_config(lora_model_dir=folder.name))  # beside the config
    config = prepared.config
    assert (config.lora_r, config.lora_alpha, config.lora_target_modules) == (2, 6, ("q_proj", "up_proj"))
    assert prepared.lora_parameters == peftdir.read(folder).shape.parameters
    assert prepared.start is not None
    assert (prepared.start.path, prepared.start.parent) == (folder, None)


def test_what_cannot_be_gone_on_from_is_refused(
    write_config: Writer, adapter_factory: Factory, tmp_path: Path, other_base: Path
) -> None:
    with pytest.raises(NotFound, match="neither a folder nor a version"):
        begin(write_config(lora_model_dir="acme/support@3"))  # nobody here knows versions
    with pytest.raises(AdapterError, match="is not an adapter directory"):
        begin(write_config(lora_model_dir=str(tmp_path)))
    with pytest.raises(BaseMismatch):
        begin(write_config(lora_model_dir=str(adapter_factory("wide", base=other_base))))
    unservable = adapter_factory("biased", config={"bias": "all"})
    with pytest.raises(ConfigError, match="cannot be served"):
        begin(write_config(lora_model_dir=str(unservable)))


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import write_tiny_base

    return write_tiny_base(tmp_path_factory.mktemp("bases") / "wide-llama", hidden=32)


# ── trained for real ──


@pytest.mark.slow
def test_a_training_goes_on_from_the_weights_of_a_run(write_config: Writer, tmp_path: Path, tiny_base: Path) -> None:
    config = write_config(max_steps=8, lora_r=3)
    first = trained(config, output_dir=str(tmp_path / "first"))
    again = write_config(max_steps=2, lora_model_dir=str(first.folder), output_dir=str(tmp_path / "again"))
    second = trained(again)
    assert losses(second.folder)[0] < 0.9 * losses(first.folder)[0]
    assert peftdir.read(second.adapter).shape.rank == 3
    assert second.record.lineage.parents == ()  # it is no version
    with pytest.raises(BaseMismatch):
        from tests.conftest import write_tiny_base

        begin(again, base_model=str(write_tiny_base(tmp_path / "other", seed=9)))


@pytest.mark.slow
@pytest.mark.parametrize("quantised", [{}, {"adapter": "qlora", "load_in_4bit": True}])
def test_the_reference_is_the_adapter_that_a_training_goes_on_from(
    quantised: dict[str, Any], write_config: Writer, adapter_factory: Factory, tmp_path: Path
) -> None:
    """At the first step model and reference are the same, so the loss is log 2; the base is far from both."""
    start = adapter_factory("start", scale=0.3)
    config = write_config(rows=PAIRS, rl="dpo", max_steps=4, lora_model_dir=str(start), **quantised)
    whole = trained(config, output_dir=str(tmp_path / "whole"))
    assert losses(whole.folder)[0] == pytest.approx(np.log(2), abs=1e-6)
    assert sorted(path.name for path in whole.adapter.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "training.yml"
    ]  # fmt: skip
    if quantised:
        return
    folder = tmp_path / "broken"

    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(*begin(config, output_dir=str(folder)), on_event=interrupt)
    resume(folder, read_run(folder))
    assert losses(folder) == losses(whole.folder)
    assert all(np.array_equal(a, weights(folder / "adapter")[k]) for k, a in weights(whole.adapter).items())


@pytest.mark.slow
@pytest.mark.parametrize("initial", ["pissa_niter_4", "olora"])
def test_initial_values_that_change_the_base_are_converted_for_the_untouched_one(
    initial: str, write_config: Writer, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of the adapter on the base as it is are those of the model that was trained."""
    import torch

    from adapterhub.trainers import adapterdir

    of_the_trained: list[Any] = []
    save = adapterdir.save_converted

    def saved(model: Any, destination: Path, folder: Path) -> None:
        with torch.no_grad():
            of_the_trained.append(model.eval()(input_ids=torch.arange(40)[None]).logits)
        save(model, destination, folder)

    monkeypatch.setattr(adapterdir, "save_converted", saved)
    rslora = {"peft_use_rslora": True} if initial == "olora" else {"lora_rank_pattern": {"q_proj": 2}}
    result = trained(write_config(peft_init_lora_weights=initial, learning_rate=0.003, max_steps=3, **rslora))
    adapter = peftdir.read(result.adapter)
    assert adapter.shape.rank == 8  # twice that of the config
    assert {v.answer for v in (peftdir.verdicts(adapter).serve, peftdir.verdicts(adapter).merge)} == {"yes"}
    found, base = logits(tiny_base, result.adapter), logits(tiny_base)
    assert float((of_the_trained[0] - base).abs().max()) > 0.1
    assert torch.allclose(found, of_the_trained[0], atol=2e-4)


@pytest.mark.slow
def test_a_run_with_such_values_goes_on_the_same(write_config: Writer, tmp_path: Path) -> None:
    config = write_config(peft_init_lora_weights="pissa", max_steps=4, learning_rate=0.003)
    whole = trained(config, output_dir=str(tmp_path / "whole"))
    folder = tmp_path / "broken"

    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(*begin(config, output_dir=str(folder)), on_event=interrupt)
    resume(folder, read_run(folder))
    assert losses(folder) == pytest.approx(losses(whole.folder), abs=1e-6)
    for name, values in weights(whole.adapter).items():
        assert np.allclose(values, weights(folder / "adapter")[name], atol=1e-6)


@pytest.mark.slow
def test_dora_is_trained_for_export_alone(write_config: Writer, ah: Ah) -> None:
    config = write_config(
        peft_use_dora=True, adapterhub={"name": "acme/support", "allow_unservable": True}, max_steps=2
    )
    reading, prepared = begin(config)
    found = ah("train", config)
    assert found.code == 0
    assert "--for export" in found.err
    adapter = peftdir.read(Path(reading.config.output_dir or "") / "adapter")
    assert adapter.shape.variant == "dora"
    assert adapter.shape.parameters == prepared.lora_parameters
    verdicts = peftdir.verdicts(adapter)
    assert (verdicts.serve.answer, verdicts.merge.answer) == ("no", "yes")
    run = str(reading.config.output_dir)
    refused = ah("publish", run)
    assert refused.code != 0
    assert "DoRA" in refused.err
    assert ah("publish", run, "--for", "export").code == 0


@pytest.mark.slow
def test_a_version_is_gone_on_from_seen_in_the_tree_and_reproduced(
    write_config: Writer, ah: Ah, tmp_path: Path
) -> None:
    config = write_config()
    assert ah("train", config).code == 0
    first = json.loads(ah("publish", tmp_path / "run", "--json").out)
    config = write_config(rows=PAIRS, rl="dpo", output_dir=str(tmp_path / "second"))
    gone_on = ah("train", config, "--from", "acme/support@1")
    assert gone_on.code == 0, gone_on.err
    assert f"going on from acme/support@{first['digest']}" in gone_on.err
    assert json.loads((tmp_path / "second/run.json").read_text())["lineage"]["parents"] == [first["digest"]]
    assert ah("publish", tmp_path / "second").code == 0
    tree = ah("tree", "acme/support").out.splitlines()
    assert tree[0].startswith("acme/support@1  sft")
    assert "└─ acme/support@2  dpo" in tree[1]
    same = ah("reproduce", "acme/support@2", "--data", tmp_path, "--base", yaml_base(config))
    assert same.code == 0, same.err
    assert "the same weights" in same.err


def yaml_base(config: Path) -> str:
    import yaml

    return str(yaml.safe_load(config.read_text())["base_model"])


@pytest.mark.slow
def test_what_began_from_no_version_says_so_when_it_is_to_be_reproduced(
    write_config: Writer, ah: Ah, tmp_path: Path, adapter_factory: Factory
) -> None:
    config = write_config(max_steps=1)
    assert ah("train", config, "--from", adapter_factory("start")).code == 0
    assert ah("publish", tmp_path / "run").code == 0
    found = ah("reproduce", "acme/support", "--data", tmp_path, "--base", yaml_base(config))
    assert found.code != 0
    assert "went on from an adapter that was never published" in found.err


def test_a_version_that_is_not_there_and_a_registry_without_use(write_config: Writer, ah: Ah, tmp_path: Path) -> None:
    config = write_config()
    found = ah("train", config, "--from", "acme/none@3")
    assert found.code != 0
    assert "neither a folder nor a version" in found.err
    assert "there is no such folder, and there is no tenant 'acme'" in found.err
    assert "neither a folder nor a version" in ah("train", config, "--from", "runs/Support_1").err
    assert not (tmp_path / "run").exists()
    assert "--registry is where --from looks" in ah("train", config, "--registry", "file:///x").err
