"""The adapter's folder, as it is published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from adapterhub.peftdir import CONFIG, WEIGHTS
from adapterhub.runrecord import ADAPTER
from adapterhub.trainers.conversion import save_converted
from adapterhub.trainers.dialect.rules import changes_the_base
from adapterhub.trainers.labels.ends import GENERATION, generation_config
from adapterhub.trainers.prepare import Prepared


def save_adapter(model: Any, folder: Path, prepared: Prepared, *, weights: Any = None) -> None:
    """Whole or not at all, and the same bytes for the same training: no path of this machine, sorted names.

    ``weights``: the model's state, where it was sharded over processes and has been gathered.
    """
    unfinished, final = folder / (ADAPTER + ".tmp"), folder / ADAPTER
    shutil.rmtree(unfinished, ignore_errors=True)
    if changes_the_base(prepared.config.peft_init_lora_weights):
        save_converted(model, unfinished, folder)
    else:
        model.save_pretrained(str(unfinished), selected_adapters=["default"], state_dict=weights)
    (unfinished / "README.md").unlink(missing_ok=True)
    file = unfinished / CONFIG
    config = json.loads(file.read_bytes())
    config["base_model_name_or_path"] = prepared.base.name
    config["revision"] = prepared.base.commit
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if prepared.template is not None:
        (unfinished / "chat_template.jinja").write_text(prepared.template, encoding="utf-8")
    if prepared.end is not None:
        number = prepared.tokenizer.convert_tokens_to_ids(prepared.end)
        text = json.dumps(generation_config(prepared.base, number), indent=2) + "\n"
        (unfinished / GENERATION).write_text(text, encoding="utf-8")
    (unfinished / WEIGHTS).chmod(0o644)  # safetensors writes for its owner only
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)
