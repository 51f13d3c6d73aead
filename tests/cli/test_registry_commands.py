"""The registry's commands as they are typed: what they print, and what they refuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapterhub.base import find_base
from adapterhub.manifest import Lineage
from adapterhub.refs import AdapterName
from adapterhub.registry import draft, open_registry
from adapterhub.runrecord import RunRecord

Ah = Callable[..., Any]
Factory = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(adapter_factory: Factory) -> Path:
    return adapter_factory()


@pytest.fixture(scope="module")
def three_versions(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, adapter_writer: Factory) -> Path:
    """A home whose registry has acme/support@1 to @3, @1 and then @2 in prod; their adapters in a1, a2, a3."""
    folder = tmp_path_factory.mktemp("three")
    registry, name = open_registry(str(folder / "registry")), AdapterName.parse("acme/support")
    for number in (1, 2, 3):
        adapter = adapter_writer(folder / f"a{number}", base=tiny_base, seed=number)
        registry.publish(draft(adapter), name=name, author="ana")
    for version in (1, 2):
        registry.set_channel(name, "prod", {version: 100}, who="ana")
    return folder


@pytest.fixture
def published(ah: Ah, three_versions: Path) -> Ah:
    """`ah` with a home of its own that holds `three_versions`."""
    shutil.copytree(three_versions, os.environ["AH_HOME"], dirs_exist_ok=True)
    return ah


def refused(done: Any, *said: str, code: int = 2) -> None:
    assert done.code == code, done
    assert done.out == ""
    assert done.err.startswith("error: ")
    for text in said:
        assert text in done.err


# ── publish ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_publish_prints_version_digest_and_verdicts(ah: Ah, adapter: Path, tiny_base: Path) -> None:
    done = ah("publish", adapter, "--name", "acme/support", "--channel", "canary", "--base", tiny_base)
    assert done.code == 0
    assert done.out.startswith("acme/support@1  sha256:")
    assert "serve   yes" in done.out
    assert "channel canary → 1" in done.out
    again = ah("publish", adapter, "--name", "acme/support", "--label", "team=x", "--json").json
    assert (again["ref"], again["version"], again["channel"]) == ("acme/support@2", 2, None)
    assert again["digest"] != done.out.split()[1]  # without the base, its fingerprint is not in the manifest
    assert again["verdicts"]["serve"]["answer"] == "unknown"
    assert again["labels"] == {"team": "x"}
    assert ah("ls", "acme/support", "--json").json[1]["channels"] == ["canary"]


def test_publish_takes_what_the_run_says(ah: Ah, adapter_factory: Factory, tiny_base: Path, tmp_path: Path) -> None:
    adapter_factory("run/adapter")
    base = find_base(str(tiny_base)).fingerprint
    run = RunRecord(
        base=base, lineage=Lineage(method="sft"), name=AdapterName("acme", "bot"), channel="prod", labels={"a": "b"}
    )
    run.write(tmp_path / "run" / "run.json")
    done = ah("publish", tmp_path / "run", "--label", "c=d", "--json").json
    assert (done["ref"], done["channel"], done["labels"]) == ("acme/bot@1", "prod", {"a": "b", "c": "d"})
    assert ah("publish", tmp_path / "run", "--name", "acme/other", "--channel", "canary", "--json").json["channel"] == (
        "canary"
    )
    shown = ah("show", "acme/bot@prod", "--json").json
    assert shown["manifest"]["base"]["content"] == base.content
    assert shown["manifest"]["lineage"]["method"] == "sft"


def test_the_base_may_come_from_the_environment(
    ah: Ah, adapter: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AH_BASE", str(tiny_base))
    assert ah("publish", adapter, "--name", "acme/support", "--json").json["verdicts"]["merge"]["answer"] == "yes"


@pytest.mark.parametrize(
    "name",
    [
        "support",
        "Acme/support",
        "../x/y",
        "acme/../y",
        "/etc/passwd",
        "acme/base",
        "acme/su\0pport",
        "a/" + "b" * 5000,
        "acme--eu/a",
        "acme/..",
        "acme/a.",
        "acme/.a",
        "acme/a..b",
        "acme/a b",
        "acme/",
        "acme/a\n",
        "acme/é",
        "acme/a@1",
    ],
)
def test_names_outside_the_grammar(ah: Ah, adapter: Path, name: str) -> None:
    refused(ah("publish", adapter, "--name", name))
    assert ah("ls", "--json").json == []


@pytest.mark.parametrize("channel", ["latest", "Prod", "3", "../x"])
def test_channels_outside_the_grammar_publish_nothing(ah: Ah, adapter: Path, channel: str) -> None:
    refused(ah("publish", adapter, "--name", "acme/support", "--channel", channel))
    assert ah("ls", "--json").json == []


@pytest.mark.parametrize("label", ["x", "=x", ""])
def test_labels_have_a_key_and_a_value(ah: Ah, adapter: Path, label: str) -> None:
    refused(ah("publish", adapter, "--name", "acme/support", "--label", label), "KEY=VALUE")


def no_config(path: Path) -> None:
    (path / "adapter_config.json").unlink()


def pickled(path: Path) -> None:
    (path / WEIGHTS).rename(path / "adapter_model.bin")


def dora(path: Path) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))


def with_nan(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, path / WEIGHTS)


def truncated(path: Path) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_config, "adapter_config.json"),
        (pickled, "pickle"),
        (dora, "DoRA"),
        (with_nan, "NaN"),
        (truncated, "truncated"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_broken_adapters_are_refused(ah: Ah, adapter: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(adapter)
    refused(ah("publish", adapter, "--name", "acme/support"), said)
    assert ah("ls", "--json").json == []


def test_a_base_that_is_not_there_or_does_not_fit(ah: Ah, adapter_factory: Factory, base_dir: Path) -> None:
    refused(ah("publish", adapter_factory(), "--name", "acme/support", "--base", "/nowhere"), "not found", "next:")
    refused(ah("publish", adapter_factory(), "--name", "acme/support", "--base", base_dir), "does not match the base")


def test_an_adapter_without_a_name(ah: Ah, adapter: Path) -> None:
    refused(ah("publish", adapter), "no name", f"ah publish {adapter} --name")


def test_a_registry_that_cannot_be_written(ah: Ah, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(ah("publish", adapter, "--name", "acme/support", "--registry", tmp_path / "file"), "cannot be written")


@pytest.mark.parametrize("url", ["s3://no bucket/x", "hf://org/x", "ftp://x", "file://host/x", ""])
def test_registries_that_are_none(ah: Ah, url: str) -> None:
    done = ah("ls", "--registry", url) if url else ah("ls", "--registry", "http://")
    refused(done, "next:")


LIMITED = """
import resource, sys
from adapterhub.cli.main import main

sys.argv = ["ah", *sys.argv[1:]]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
main()
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_nothing_half_done(ah: Ah, adapter: Path) -> None:
    """A limit on file sizes stops the weights in the middle, as a full disk does."""
    command = [sys.executable, "-c", LIMITED, "publish", adapter, "--name", "acme/support"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "type the same command again" in done.stderr
    assert ah("ls", "--json").json == []
    assert list((Path(os.environ["AH_HOME"]) / "registry" / "tmp").iterdir()) == []
    assert ah("publish", adapter, "--name", "acme/support", "--json").json["version"] == 1
    for where in (("--to", str(adapter.parent / "pulled")), ()):
        pull = [sys.executable, "-c", LIMITED, "pull", "acme/support", *where]
        done = subprocess.run(pull, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (2, "")
        assert "cannot be" in done.stderr
        assert "type the same command again" in done.stderr
    assert not (adapter.parent / "pulled").exists()
    assert Path(ah("pull", "acme/support").out.strip(), "adapter_model.safetensors").is_file()


# ── ls, show ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ls_at_every_level(published: Ah) -> None:
    assert published("ls", "--json").json == [{"tenant": "acme", "adapters": 1}]
    assert published("ls", "acme", "--json").json == [{"adapter": "acme/support", "latest": 3, "channels": {"prod": 2}}]
    rows = published("ls", "acme/support", "--json").json
    assert [(r["version"], r["status"], r["channels"]) for r in rows] == [
        (3, "active", []),
        (2, "active", ["prod"]),
        (1, "active", []),
    ]
    table = published("ls", "acme/support").out.splitlines()
    assert table[0].split()[:3] == ["VERSION", "STATUS", "CHANNELS"]
    assert [line.split()[0] for line in table[1:]] == ["3", "2", "1"]


def test_ls_of_nothing(ah: Ah) -> None:
    empty = ah("ls")
    assert (empty.code, empty.out) == (0, "")
    assert "nothing is published" in empty.err
    assert not (Path(os.environ["AH_HOME"]) / "registry").exists()  # looking makes nothing
    refused(ah("ls", "acme"), "no tenant 'acme'")
    refused(ah("ls", "acme/support"), "no tenant 'acme'")


def test_show_tells_everything_also_of_what_is_yanked(published: Ah) -> None:
    published("yank", "acme/support@2", "--why", "rude")
    text = published("show", "acme/support@2").out
    for said in ("acme/support@2", "sha256:", "yanked  rude", "prod", "rank 4", WEIGHTS):
        assert said in text
    shown = published("show", "acme/support@2", "--json").json
    assert (shown["status"], shown["status_why"], shown["channels"]) == ("yanked", "rude", ["prod"])
    assert published("show", f"acme/support@{shown['digest']}", "--json").json["version"] == 2
    assert published("show", "acme/support", "--json").json["version"] == 3
    refused(published("show", "acme/support@prod"), "yanked", "rude")
    refused(published("show", "acme/support@9"), "no version 9", "ah ls acme/support")


# ── channels ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_channels_are_set_logged_and_rolled_back(published: Ah) -> None:
    assert published("channel", "set", "acme/support", "prod", "latest", "--why", "news").out == (
        "acme/support@prod → 3\n"
    )
    assert published("channel", "rollback", "acme/support", "prod", "--json").json["targets"][0]["version"] == 2
    assert published("channel", "rollback", "acme/support", "prod", 1).out == "acme/support@prod → 1\n"
    log = published("channel", "log", "acme/support", "prod", "--json").json
    assert [(m["seq"], m["kind"], m["targets"][0]["version"]) for m in log] == [
        (5, "rollback", 1),
        (4, "rollback", 2),
        (3, "set", 3),
        (2, "set", 2),
        (1, "set", 1),
    ]
    assert "news" in published("channel", "log", "acme/support", "prod").out
    assert published("channel", "set", "acme/support", "canary", "prod", "--json").json["targets"][0]["version"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("set", "acme/support", "prod", "9"), "no version 9"),
        (("set", "acme/support", "prod", "nothing"), "no channel 'nothing'"),
        (("set", "acme/support", "latest", "1"), "computed"),
        (("set", "acme/nothing", "prod", "1"), "no adapter"),
        (("set", "nobody/support", "prod", "1"), "no tenant"),
        (("set", "acme/support", "prod", "0"), "names no version"),
        (("set", "acme", "prod", "1"), "not an adapter name"),
        (("log", "acme/support", "canary"), "no channel 'canary'"),
        (("rollback", "acme/support", "canary"), "no channel 'canary'"),
        (("rollback", "acme/support", "prod", "7"), "no version 7"),
    ],
)
def test_channels_that_cannot_move(published: Ah, words: tuple[str, ...], said: str) -> None:
    refused(published("channel", *words), said)
    assert len(published("channel", "log", "acme/support", "prod", "--json").json) == 2


def test_a_rollback_with_nothing_before_it(published: Ah) -> None:
    published("channel", "rollback", "acme/support", "prod")
    refused(published("channel", "rollback", "acme/support", "prod"), "nothing to go back to", "ah channel rollback")


# ── rollouts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rollout_from_start_to_promotion(published: Ah) -> None:
    where = ("acme/support", "prod")
    started = published("rollout", "start", *where, 3, "--weight", 5, "--max-error-rate", 0.2, "--why", "news").out
    assert "acme/support@prod → 2:95% 3:5%  rollout of 3 running" in started
    assert "over 20 % errors" in started
    assert "2:95% 3:5%" in published("channel", "log", *where).out
    assert published("rollout", "pause", *where, "--json").json["phase"] == "paused"
    status = published("rollout", "status", *where, "--json").json
    assert (status["phase"], status["candidate"]["version"], status["stable"]["version"]) == ("paused", 3, 2)
    published("rollout", "start", *where, 3, "--weight", 50)
    assert "promoted" in published("rollout", "promote", *where).out
    assert "promoted" in published("rollout", "status", *where, "--watch").out, "it ends when none is running"
    phases = [move["phase"] for move in published("rollout", "history", *where, "--json").json]
    assert phases == ["promoted", "running", "paused", "running", "none", "none"]
    assert "news" in published("rollout", "history", *where).out


def test_a_rollout_that_is_aborted(published: Ah) -> None:
    published("rollout", "start", "acme/support", "prod", "latest")
    assert "acme/support@prod → 2  rollout of 3 aborted" in published("rollout", "abort", "acme/support", "prod").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("start", "acme/support", "prod", "9"), "no version 9"),
        (("start", "acme/support", "beta", "3"), "no channel 'beta'"),
        (("start", "acme/support", "prod", "2"), "points at version 2 already"),
        (("start", "acme/support", "prod", "3", "--weight", "100"), "ah rollout promote acme/support prod"),
        (("start", "acme/support", "prod", "3", "--weight", "0"), "from 1 to 99"),
        (("start", "acme/support", "prod", "3", "--max-error-rate", "5"), "a share from 0 to 1"),
        (("promote", "acme/support", "prod"), "no rollout"),
        (("pause", "acme/support", "prod"), "no rollout"),
        (("abort", "acme/support", "prod"), "no rollout"),
        (("status", "acme/support", "latest"), "computed"),
        (("history", "acme/nothing", "prod"), "no adapter"),
    ],
)
def test_rollouts_that_cannot_be(published: Ah, words: tuple[str, ...], said: str) -> None:
    refused(published("rollout", *words), said)
    assert len(published("channel", "log", "acme/support", "prod", "--json").json) == 2


# ── yank, deprecate, delete ──────────────────────────────────────────────────────────────────────────────────────


def test_yank_and_undo(published: Ah) -> None:
    done = published("yank", "acme/support@2", "--why", "rude")
    assert done.out == "acme/support@2 is yanked\n"
    assert "acme/support@prod still points at it" in done.err
    refused(published("pull", "acme/support@2"), "yanked", "rude")
    refused(published("pull", "acme/support@prod"), "yanked")
    refused(published("channel", "set", "acme/support", "canary", "2"), "yanked")
    assert published("yank", "acme/support@2", "--undo", "--json").json["status"] == "active"
    assert published("pull", "acme/support@prod").code == 0
    refused(published("yank", "acme/support@2", "--undo"), "not yanked")


def test_undo_gives_back_the_status_before(published: Ah) -> None:
    published("deprecate", "acme/support@3", "--why", "old")
    published("yank", "acme/support@3")
    assert published("yank", "acme/support@3", "--undo", "--json").json["status"] == "deprecated"
    pulled = published("pull", "acme/support@3")
    assert pulled.code == 0
    assert "deprecated" in pulled.err
    assert published("deprecate", "acme/support@3", "--undo").out == "acme/support@3 is active\n"


def test_a_yanked_version_is_not_let_in_by_deprecating_it(published: Ah) -> None:
    published("yank", "acme/support@3")
    refused(published("deprecate", "acme/support@3"), "is yanked", "ah yank acme/support@3 --undo")


def test_deleting_is_asked_for_twice_and_final(published: Ah) -> None:
    refused(published("delete", "acme/support@3"), "final", "--yes")
    assert published("delete", "acme/support@3", "--yes", "--why", "law").out == "acme/support@3 is deleted\n"
    refused(published("yank", "acme/support@3"), "deleted")
    refused(published("pull", "acme/support@3"), "deleted", "law")
    assert published("show", "acme/support", "--json").json["version"] == 2


@pytest.mark.parametrize("command", ["yank", "deprecate"])
@pytest.mark.parametrize("ref", ["acme/support", "acme/support@prod", f"acme/support@sha256:{'a' * 64}"])
def test_a_status_belongs_to_a_numbered_version(published: Ah, command: str, ref: str) -> None:
    refused(published(command, ref), "number")


def test_a_version_that_is_not_there_has_no_status(published: Ah) -> None:
    refused(published("yank", "acme/support@9"), "no version 9")
    refused(published("yank", "acme/nothing@1"), "no adapter")


# ── pull ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pull_prints_the_verified_folder(published: Ah, three_versions: Path, tmp_path: Path) -> None:
    folder = Path(published("pull", "acme/support@1").out.strip())
    assert load_file(folder / WEIGHTS).keys() == load_file(three_versions / "a1" / WEIGHTS).keys()
    assert (folder / WEIGHTS).read_bytes() == (three_versions / "a1" / WEIGHTS).read_bytes()
    assert folder.is_relative_to(os.environ["AH_HOME"])
    pulled = published("pull", "acme/support@1", "--to", tmp_path / "here", "--json").json
    assert pulled["path"] == str(tmp_path / "here")
    assert (tmp_path / "here" / WEIGHTS).read_bytes() == (three_versions / "a1" / WEIGHTS).read_bytes()
    refused(published("pull", "acme/support@1", "--to", tmp_path / "here"), "there already")


def test_what_was_pulled_can_be_published_again_with_its_digest(published: Ah, tmp_path: Path) -> None:
    digest = published("pull", "acme/support@1", "--to", tmp_path / "here", "--json").json["digest"]
    again = published("publish", tmp_path / "here", "--name", "beta/copy", "--json").json
    assert (again["ref"], again["digest"]) == ("beta/copy@1", digest)


def test_wrong_bytes_are_never_pulled(published: Ah, tmp_path: Path) -> None:
    for blob in (Path(os.environ["AH_HOME"]) / "registry/t/acme/blobs").rglob("*"):
        if blob.is_file() and blob.stat().st_size > 5000:
            data = bytearray(blob.read_bytes())
            data[-1] ^= 1
            blob.write_bytes(data)
    refused(published("pull", "acme/support@1"), "not what was published", code=1)
    refused(published("pull", "acme/support@1", "--to", tmp_path / "here"), "not what was published", code=1)
    assert not (tmp_path / "here").exists()
    assert not list((Path(os.environ["AH_HOME"]) / "cache").rglob(WEIGHTS))


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("nobody/support", "no tenant"),
        ("acme/nothing", "no adapter"),
        ("acme/support@9", "no version 9"),
        ("acme/support@canary", "no channel"),
        ("../support", "not a tenant name"),
        ("acme/support@../x", "not a channel name"),
    ],
)
def test_pulling_what_is_not_there(published: Ah, ref: str, said: str) -> None:
    refused(published("pull", ref), said)


def test_merging_needs_a_base_and_a_place(published: Ah, tmp_path: Path, tiny_base: Path) -> None:
    refused(published("pull", "acme/support", "--merged", "--to", tmp_path / "m"), "--base")
    refused(published("pull", "acme/support", "--merged", "--base", tiny_base), "--to")
    refused(published("pull", "acme/support", "--base", tiny_base), "--merged")


@pytest.mark.slow
def test_a_merged_model_stands_alone(published: Ah, tmp_path: Path, tiny_base: Path) -> None:
    done = published("pull", "acme/support@1", "--merged", "--base", tiny_base, "--to", tmp_path / "model", "--json")
    assert done.json["merged"] is True
    merged = load_file(tmp_path / "model" / "model.safetensors")
    base = load_file(tiny_base / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(merged[changed], base[changed])
    assert np.array_equal(merged["model.norm.weight"], base["model.norm.weight"])


# ── start-up ─────────────────────────────────────────────────────────────────────────────────────────────────────

HEAVY = ["torch", "transformers", "peft", "trl", "datasets", "vllm", "boto3", "numpy", "rich", "openai", "httpx"]
LOADED = """
import sys
from adapterhub.cli.main import main

sys.argv = ["ah", *sys.argv[1:]]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("LOADED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("words", [["--help"], ["ls"], ["ls", "acme/support"], ["show", "acme/support"]])
def test_looking_at_the_registry_loads_nothing_heavy(published: Ah, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *words], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(done.stdout.splitlines()[-1].split()[1:])
    assert "typer" in loaded
    assert not loaded & set(HEAVY)
