"""``use_ray: true``: two workers of one machine train what one process trains with twice the accumulation."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.errors import ConfigError, MissingDependency
from adapterhub.trainers import parse_yaml, read_config
from adapterhub.trainers.onray import NOT_STARTED
from tests.trainers.conftest import trained

Writer = Callable[..., Path]
ON_RAY = {"use_ray": True, "ray_num_workers": 2, "resources_per_worker": {"CPU": 0.5}}
SMALLEST = "base_model: x\ndatasets: [{path: train.jsonl}]\n"


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the ray extra is not installed")
def test_two_workers_train_as_one_process_with_twice_the_accumulation(write_config: Writer, tmp_path: Path) -> None:
    one = trained(write_config(bf16=False, gradient_accumulation_steps=2, output_dir=str(tmp_path / "one")))
    config = write_config(bf16=False, **ON_RAY, output_dir=str(tmp_path / "two"))
    # A process of its own: Ray leaves files and processes open in the one that it was started in.
    command = [sys.executable, "-m", "adapterhub.cli.main", "train", str(config), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if NOT_STARTED in done.stderr:
        pytest.skip(f"Ray gives its own processes 15 s to come up: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(one.folder), abs=1e-3)
    assert json.loads(done.stdout)["tokens"] == one.fitted.tokens
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_ray_that_is_not_installed_is_named_with_the_command(
    write_config: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency) as caught:
        trained(write_config(**ON_RAY))
    assert caught.value.hint == 'pip install "adapterhub[ray]"'


def test_workers_are_counted_once() -> None:
    text = SMALLEST + "use_ray: true\nadapterhub: {num_processes: 2}\n"
    with pytest.raises(ConfigError, match="num_processes contradicts use_ray"):
        read_config(parse_yaml(text, source="config.yml"))
    with pytest.raises(ConfigError, match="resources_per_worker expects lines like `GPU: 1`"):
        read_config(parse_yaml(SMALLEST + "resources_per_worker: 3", source="config.yml"))
