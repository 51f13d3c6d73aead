"""One training in two processes: the same loss as one with twice the accumulation; and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from adapterhub.errors import RunFailed
from adapterhub.trainers import read_run, resume
from adapterhub.trainers.events import Event, Step
from tests.trainers.conftest import trained

pytestmark = pytest.mark.slow

Writer = Callable[..., Path]
TWO = {"adapterhub": {"name": "acme/support", "num_processes": 2}}
KEYS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "bf16": False}


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def events() -> list[Event]:
    return []


def test_two_processes_train_as_one_with_twice_the_accumulation(
    write_config: Writer, tmp_path: Path, events: list[Event]
) -> None:
    one = trained(write_config(**KEYS, gradient_accumulation_steps=2, output_dir=str(tmp_path / "one")))
    two = trained(write_config(**KEYS, **TWO, output_dir=str(tmp_path / "two")), on_event=events.append)
    assert losses(two.folder) == pytest.approx(losses(one.folder), abs=1e-3)
    assert two.fitted.tokens == one.fitted.tokens
    assert [e.step for e in events if isinstance(e, Step)] == [1, 2, 3, 4]  # heard once
    ours, theirs = (load_file(r.adapter / "adapter_model.safetensors") for r in (two, one))
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, abs=1e-3)
    assert len(list((two.folder / "checkpoints").iterdir())) == 2
    assert "num_processes: 2" in (two.folder / "config.resolved.yml").read_text()


def test_a_killed_process_ends_all_and_the_run_goes_on(write_config: Writer, tmp_path: Path) -> None:
    keys = KEYS | {"max_steps": 60}  # enough that it is not over before the signal arrives
    one = trained(write_config(**keys, gradient_accumulation_steps=2, output_dir=str(tmp_path / "one")))
    started: list[int] = []

    def kill_one(event: Event) -> None:
        if isinstance(event, Step) and event.step == 3:
            started.extend(children())
            os.kill(started[-1], signal.SIGKILL)

    folder = tmp_path / "killed"
    with pytest.raises(RunFailed, match=r"process \d of the training was ended by SIGKILL") as caught:
        trained(write_config(**keys, **TWO, output_dir=str(folder)), on_event=kill_one)
    assert caught.value.hint == f"ah train --resume {folder}"
    assert not set(started) & set(children())
    resume(folder, read_run(folder))
    assert losses(folder) == pytest.approx(losses(one.folder), abs=1e-3)


def children() -> list[int]:
    """Processes of a training that this one started."""
    found = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        for pid in (task / "children").read_text().split():
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


def test_ctrl_c_saves_one_checkpoint_and_ends_all(write_config: Writer, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    keys = {**KEYS, "max_steps": 4000, "save_steps": 4000}
    config = write_config(**keys, **TWO, output_dir=str(folder))
    command = [sys.executable, "-m", "adapterhub.cli.main", "train", str(config)]
    # A group of its own, so that the signal reaches all of it, as a terminal's does.
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("step 1/"):
                break
        os.killpg(process.pid, signal.SIGINT)  # once: a second one means at once, and a step may be told of twice
        said += process.stderr
    assert process.returncode == 130
    assert len([line for line in said if "stopping after this step" in line]) == 1
    assert f"ah train --resume {folder}" in "".join(said)
    assert len(list((folder / "checkpoints").iterdir())) == 1
