"""`ah` with a registry on the Hub, and adapters of others that are brought in from there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Ah = Callable[..., Any]
SERVER = Path(__file__).parents[1] / "registry" / "hub_server.py"


@pytest.fixture
def adapter(adapter_factory: Callable[..., Path]) -> Path:
    return adapter_factory()


@pytest.fixture
def server() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("hub_server", SERVER)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.HubServer().running() as running:
        yield running


@pytest.fixture
def on_the_hub(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """This process's client speaks to the stand-in, as HF_ENDPOINT and HF_TOKEN would tell it."""
    from huggingface_hub import constants

    for name, value in (("ENDPOINT", server.endpoint), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    return server


def push(server: Any, repo: str, folder: Path, *, leave: str = "") -> str:
    """What somebody pushed without AdapterHub; returns the commit."""
    server.create(repo, private=False)
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name != leave}
    return str(server.put(repo, "main", **files))


def test_published_moved_and_pulled(ah: Ah, adapter: Path, on_the_hub: Any, tmp_path: Path) -> None:
    where = ("--registry", "hf://acme-models")
    assert ah("publish", adapter, "--name", "acme/support", "--channel", "prod", *where).code == 0
    assert ah("ls", "--json", *where).code == 0
    pulled = ah("pull", "acme/support@prod", "--to", tmp_path / "pulled", *where)
    assert pulled.code == 0, pulled.err
    weights = "adapter_model.safetensors"
    assert (tmp_path / "pulled" / weights).read_bytes() == (adapter / weights).read_bytes()
    assert ah("copy", "acme/support@prod", tmp_path / "other", *where).code == 0


def test_an_adapter_of_somebody_is_published_here(ah: Ah, adapter: Path, on_the_hub: Any, tmp_path: Path) -> None:
    commit = push(on_the_hub, "someone/lora", adapter)
    on_the_hub.put("someone/lora", "main", **{"README.md": b"later"})
    done = ah("publish", f"hf://someone/lora@{commit}", "--name", "acme/theirs", "--json")
    assert done.code == 0, done.err
    assert done.json["labels"] == {"hub": "someone/lora", "hub_commit": commit}
    assert ah("pull", "acme/theirs", "--to", tmp_path / "pulled").code == 0
    assert not (tmp_path / "pulled" / "README.md").exists()
    assert ah("publish", "hf://someone/lora", "--name", "acme/theirs", "--json").json["labels"]["hub_commit"] != commit


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("hf://someone", "names no repository"),
        ("hf://someone/lora@no-such", "cannot be read"),
        ("hf://someone/nothing", "no such repository"),
        ("hf://someone/pickled", "is a pickle"),
    ],
)
def test_what_cannot_be_brought_in(ah: Ah, adapter: Path, on_the_hub: Any, source: str, said: str) -> None:
    push(on_the_hub, "someone/lora", adapter)
    push(on_the_hub, "someone/pickled", adapter, leave="adapter_model.safetensors")
    on_the_hub.put("someone/pickled", "main", **{"adapter_model.bin": b"pickle"})
    done = ah("publish", source, "--name", "acme/theirs")
    assert done.code == 2
    assert said in done.err
    assert "next:" in done.err


HUB = ("--registry", "hf://acme-models")
REPO = "acme-models/acme.support"


def _no_token(server: Any, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN")
    patch.setattr("huggingface_hub.get_token", lambda: None)
    patch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)


def _wrong_token(server: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", "hf_wrong")


def _gated(server: Any, patch: pytest.MonkeyPatch) -> None:
    server.repositories[REPO].gated = True
    patch.setenv("HF_TOKEN", "hf_reader")


def _renamed(server: Any, patch: pytest.MonkeyPatch) -> None:
    server.rename(REPO, "acme-models/acme.other")


def _deleted(server: Any, patch: pytest.MonkeyPatch) -> None:
    del server.repositories[REPO]


def _busy(server: Any, patch: pytest.MonkeyPatch) -> None:
    for method in ("GET", "POST", "HEAD"):
        for _ in range(40):
            server.fail(method, "/", 429)


@pytest.mark.parametrize(
    ("trouble", "said", "todo"),
    [
        (_no_token, "no token is set", "hf auth login"),
        (_wrong_token, "does not take the token", "hf auth login"),
        (_gated, "gated", "ask for access on"),
        (_renamed, "was renamed on the Hub", "give it its name back"),
        (_deleted, "there is no tenant 'acme'", "ah ls"),
        (_busy, "too many requests", "wait some minutes"),
    ],
)
@pytest.mark.parametrize("command", [("ls", "acme/support"), ("pull", "acme/support@1", "--to", "out"),
                                     ("channel", "set", "acme/support", "prod", "1")])  # fmt: skip
def test_a_hub_that_says_no(
    ah: Ah,
    adapter: Path,
    on_the_hub: Any,
    monkeypatch: pytest.MonkeyPatch,
    trouble: Callable[[Any, pytest.MonkeyPatch], None],
    said: str,
    todo: str,
    command: tuple[str, ...],
) -> None:
    monkeypatch.setattr("adapterhub.registry.hub.client._PAUSES", (0.0, 0.0))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    assert ah("publish", adapter, "--name", "acme/support", *HUB).code == 0
    trouble(on_the_hub, monkeypatch)
    done = ah(*command, *HUB)
    assert (done.code, done.out) == (2, ""), done
    assert said in done.err and "next:" in done.err and todo in done.err.partition("next:")[2], done.err
    assert "Traceback" not in done.err
    assert not Path("out").exists()


def test_what_a_killed_publish_left_goes(ah: Ah, adapter: Path, on_the_hub: Any) -> None:
    assert ah("publish", adapter, "--name", "acme/support", *HUB).code == 0
    branches = on_the_hub.repositories[REPO].branches
    left = f"ah-staging-{1_700_000_000_000}-{'a' * 32}"
    branches[left] = branches["main"]
    done = ah("gc", *HUB)
    assert done.code == 0 and "1 unfinished writes" in done.err and "the Hub keeps the bytes" in done.err
    assert left not in branches


def test_a_gitignore_hides_no_file_of_a_version(ah: Ah, adapter: Path, on_the_hub: Any) -> None:
    on_the_hub.create(REPO)
    on_the_hub.put(REPO, "main", **{".gitignore": b"*.safetensors\n"})
    assert ah("publish", adapter, "--name", "acme/support", *HUB).code == 0
    assert "adapter_model.safetensors" in on_the_hub.tree(REPO, "v1")


LOAD = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(1, 9)[None]
before = model(ids).logits
loaded = PeftModel.from_pretrained(model, "acme-models/acme.support", revision="v1")
assert not torch.equal(before, loaded(ids).logits)
print("loaded", loaded.peft_config["default"].r)
"""


@pytest.mark.slow
def test_peft_loads_a_version_from_its_repository(
    ah: Ah, adapter: Path, tiny_base: Path, on_the_hub: Any, tmp_path: Path
) -> None:
    assert ah("publish", adapter, "--name", "acme/support", "--registry", "hf://acme-models").code == 0
    environment = os.environ | {
        "HF_ENDPOINT": on_the_hub.endpoint,
        "HF_TOKEN": "hf_writer",
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tiny_base)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loaded" in done.stdout
