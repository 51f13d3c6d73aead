"""The other side of the training benchmarks: the script that one writes with TRL alone.

``plain_trl.py SETTINGS.json``: rows of one question and one answer, `SFTTrainer` as it comes, with the settings of the
benchmark and nothing else. Leaves the adapter in ``out`` and ``steps.json`` beside it: seconds and tokens after each
optimizer step, counted by transformers itself.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.steps: list[tuple[float, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append((time.monotonic() - self.began, int(state.num_input_tokens_seen)))


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    rows = [json.loads(line)["messages"] for line in Path(settings["data"]).read_text().splitlines()]
    clock = Clock()
    trainer = SFTTrainer(
        model=settings["base"],
        args=SFTConfig(
            output_dir=settings["out"],
            per_device_train_batch_size=settings["micro_batch"],
            gradient_accumulation_steps=settings["accumulation"],
            num_train_epochs=settings["epochs"],
            max_steps=settings["max_steps"] or -1,
            learning_rate=settings["rate"],
            lr_scheduler_type="cosine",
            warmup_steps=settings["warmup"],
            max_length=settings["sequence_len"],
            bf16=settings["bf16"],
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=settings["seed"],
            data_seed=settings["seed"],
            use_cpu=settings["cpu"],
            disable_tqdm=True,
            include_num_input_tokens_seen="non_padding",
        ),
        train_dataset=Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows]),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=settings["rank"],
            lora_alpha=settings["alpha"],
            lora_dropout=settings["dropout"],
            target_modules=settings["targets"],
        ),
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model(settings["out"])
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    Path(settings["out"], "steps.json").write_text(json.dumps({"steps": clock.steps, "losses": losses}))


if __name__ == "__main__":
    main()
