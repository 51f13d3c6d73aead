"""The real engine, while what surrounds it breaks, and with adapters of every shape that may be published."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapterhub.refs import AdapterName
from adapterhub.registry import draft

pytestmark = pytest.mark.engine

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_a_registry_that_is_gone(served: Any) -> None:
    served.publish("acme/before", seed=60, channel="prod")
    served.publish("acme/never", seed=61)
    text = served.text("acme/before@prod")
    folder = Path(served.registry.url.removeprefix("file://"))
    away = folder.rename(folder.with_name("away"))
    try:
        refused = served.ask("acme/never")
        assert refused.status_code == 503
        assert "the registry does not answer" in refused.json()["error"]["message"]
        assert str(folder) not in refused.text
        assert served.text("acme/before@prod") == text
        assert served.http.get("/ready").status_code == 200
    finally:
        away.rename(folder)
    assert served.ask("acme/never").status_code == 200


def test_a_file_of_other_bytes_is_refused_to_its_callers_alone(served: Any) -> None:
    record = served.publish("acme/damaged", seed=62)
    weights = next(f for f in record.manifest.files if f.path == "adapter_model.safetensors")
    blob = next(Path(served.registry.url.removeprefix("file://")).rglob(weights.sha256))
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(raw)
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(served.ask, ["acme/damaged", "acme/support@1"] * 2))
    assert [a.status_code for a in answers] == [500, 200] * 2
    assert "acme/damaged" not in {entry["model"].partition("@")[0] for entry in served.state()["resident"]}


def test_one_that_the_engine_refuses_is_its_callers_mistake_and_nobody_elses(
    served: Any, base_dir: Path, adapter_writer: Callable[..., Path]
) -> None:
    """Whole by every check of ours, and not for vLLM, which knows no such initialisation."""
    path = adapter_writer(served.folder / "refused", base=base_dir, config={"init_lora_weights": "of-my-own"})
    served.registry.publish(draft(path, base=served.base), name=AdapterName.parse("acme/refused"), author="tests")
    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(served.ask, ["acme/refused", "acme/support@1", "base"] * 4))
    assert [a.status_code for a in answers] == [400, 200, 200] * 4
    assert "the engine refuses it" in answers[0].json()["error"]["message"]
    assert str(served.folder) not in answers[0].text


def test_ranks_types_and_targets_of_all_kinds_side_by_side(
    served: Any, base_dir: Path, adapter_writer: Callable[..., Path]
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "rank-1": {"rank": 1, "targets": ("o_proj",)},
        "rank-16": {"rank": 16, "targets": ALL},
        "half": {"dtype": "float16", "targets": ("q_proj", "v_proj")},
        "mlp": {"rank": 4, "targets": ("gate_proj", "up_proj", "down_proj")},
        "rslora": {"rank": 8, "targets": ("down_proj",), "config": {"use_rslora": True}},
    }
    for number, (name, options) in enumerate(kinds.items()):
        path = adapter_writer(served.folder / f"kind-{name}", base=base_dir, seed=70 + number, scale=0.3, **options)
        served.registry.publish(draft(path, base=served.base), name=AdapterName.parse(f"kinds/{name}"), author="tests")
    models = [f"kinds/{name}" for name in kinds]
    alone = {model: served.text(model, tokens=4) for model in models}
    with ThreadPoolExecutor(8) as clients:
        together = list(clients.map(lambda m: served.text(m, tokens=4), [*models, "base"] * 3))
    assert together == [*alone.values(), served.text("base", tokens=4)] * 3
    assert len(set(alone.values())) >= len(kinds) - 1


def test_headers_of_a_megabyte(served: Any) -> None:
    answer = served.http.get("/v1/models", headers={"x-long": "x" * 2**20})
    assert answer.status_code in (400, 431)
    assert served.http.get("/ready").status_code == 200
