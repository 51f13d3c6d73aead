"""Files that people have: each passes the check, or is refused for what is wrong in it, with the right key named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import ConfigError
from adapterhub.trainers.dialect import Machine, Reading, parse_yaml, read_config, read_yaml
from adapterhub.trainers.dialect.keys import known_keys
from adapterhub.trainers.dialect.noted import ALSO_CALLED
from adapterhub.trainers.labels import templates
from tests.trainers.conftest import SEED

FILES = sorted((Path(__file__).parent / "axolotl").glob("*.yml"))
TYPO = "sft-qlora-falcon-typo.yml"
SMALLEST = "base_model: x\ndatasets: [{path: train.jsonl}]\n"
Ah = Callable[..., Any]
Writer = Callable[..., Path]

every_file = pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)


def read(text: str, **options: Any) -> Reading:
    return read_config(parse_yaml(SMALLEST + text, source="config.yml"), machine=Machine(gpu=False), **options)


def fate(reading: Reading, key: str) -> tuple[str, str]:
    return next((f.kind, f.note) for f in reading.fates if f.key == key)


@every_file
def test_an_axolotl_file_passes_the_check_and_every_key_is_accounted_for(ah: Ah, file: Path) -> None:
    found = ah("train", file, "--check", "--json", *(["--allow-unknown-keys"] if file.name == TYPO else []))
    assert found.code == 0, found.err
    answer = json.loads(found.out)
    fates = {entry["key"] for entry in answer["keys"]}
    given = {key for key, value in read_yaml(file).values.items() if value is not None} - {"datasets"}
    assert fates >= given
    assert answer["absent"][0].startswith("base_model ")
    assert answer["absent"][1].startswith("the data set some-org/")


def test_the_authors_own_typo_is_refused_with_the_right_key(ah: Ah) -> None:
    found = ah("train", FILES[0].with_name(TYPO), "--check")
    assert found.code == 2
    assert f"{TYPO}:41:1: unknown key 'context_parapllel_size'" in found.err
    assert "did you mean context_parallel_size?" in found.err


def test_a_deepspeed_file_is_checked_where_it_is_and_told_of_where_not(ah: Ah, tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    config.write_text(SMALLEST + "deepspeed: zero.json\n")
    assert "not here, so not checked: deepspeed zero.json" in ah("train", config, "--check").err
    for content, what in (
        ('{"zero_optimization": {"stage": 4}}', "a stage from 0 to 3"),
        ('{"zero_optimisation": {"stage": 2}}', "did you mean zero_optimization?"),
        ('{"train_micro_batch_size_per_gpu": 3}', "train_micro_batch_size_per_gpu is 3, and the config says 1"),
        ("[1]", "is no JSON object"),
        ("{", "cannot be read"),
    ):
        (tmp_path / "zero.json").write_text(content)
        found = ah("train", config, "--check")
        assert (found.code, what in found.err) == (2, True), found.err
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}')
    found = ah("train", config, "--check")
    assert (found.code, "deepspeed zero.json" in found.err) == (0, False)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("deepspeed: 3", "a JSON file, or what one holds"),
        ("deepspeed: {zero_optimization: {stage: 4}}", "a stage from 0 to 3"),
        ("deepspeed: {zero: 3}", "holds 'zero', which DeepSpeed's config does not have"),
        ("fsdp: [full_shrd]", "some of full_shard"),
        ("fsdp: full_shard\nfsdp_config: {fsdp_state_dict_tpe: X}", "did you mean state_dict_type?"),
        ("fsdp: full_shard\nfsdp_config: {state_dict_type: WHOLE}", "one of FULL_STATE_DICT"),
        ("fsdp: full_shard\nfsdp_config: {fsdp_offload_params: 1}", "offload_params to be true or false"),
        ("fsdp_version: 3", "one of 1, 2"),
        ("ray_num_workers: 0", "a whole number from 1"),
        ("chat_template: lama3", "did you mean llama3?"),
        ("chat_template: tokenizer_default_fallback_x", "expects a template's name"),
        ("bnb_config_kwargs: {bnb_4bit_quant: nf4}", "holds 'bnb_4bit_quant'"),
        ("bnb_config_kwargs: {bnb_4bit_quant_type: nf5}", "has bnb_4bit_quant_type, which expects one of nf4, fp4"),
        ("gradient_checkpointing_kwargs: {use_reentrant: 1}", "has use_reentrant, which expects true or false"),
        ("optimizer: sgd\noptim_args: {beta: 1}", "holds 'beta'"),
        ("batch_size: 7\nmicro_batch_size: 2", "7 rows are no multiple of 2"),
        ("batch_size: 8\nmicro_batch_size: 2\ngradient_accumulation_steps: 2", "micro_batch_size times as many"),
        ("optim_args: {momentum: 0.9}", "only sgd has options"),
        ("lora_target_linear: false", "name some"),
        ("deepspeed: {}\nfsdp: full_shard\nload_in_8bit: true", "an 8-bit base cannot be shared out"),
        ("deepspeed: x.json\nfsdp: full_shard", "deepspeed contradicts fsdp"),
        ("cosine_min_lr_ratio: 0.1\nlr_scheduler: linear", "for lr_scheduler: cosine"),
        ("test_datasets: [{path: a, chat_template: chatml}, {path: b, chat_template: llama3}]", "one template"),
        ("chat_template: gemma\ntest_datasets: [{path: a, chat_template: chatml}]", "one template"),
        ("save_strategy: best", "the best is kept with load_best_model_at_end"),
    ],
)
def test_what_cannot_be_right_is_refused_before_a_library_is_asked(line: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(line)
    assert what in str(caught.value)
    assert caught.value.what.startswith("config.yml:3:") or "config.yml:" in caught.value.what


def test_both_spellings_of_fsdp_are_the_same() -> None:
    first = read("fsdp: full_shard auto_wrap\nfsdp_config: {fsdp_offload_params: true}").config
    second = read("fsdp: [full_shard, auto_wrap]\nfsdp_config: {offload_params: true}").config
    assert first == second
    assert (first.fsdp, first.fsdp_config) == (("full_shard", "auto_wrap"), {"offload_params": True})


@pytest.mark.parametrize(
    ("lines", "key", "kind"),
    [
        ("chat_template: llama3", "chat_template", "honoured"),
        ("chat_template: qwen3", "chat_template", "approximated"),
        ("evals_per_epoch: 2", "evals_per_epoch", "without effect"),
        ("evals_per_epoch: 2\nval_set_size: 0.1", "evals_per_epoch", "honoured"),
        ("metric_for_best_model: eval_loss", "metric_for_best_model", "without effect"),
        ("mlflow_experiment_name: x", "mlflow_experiment_name", "without effect"),
        ("mlflow_experiment_name: x\nuse_mlflow: true", "mlflow_experiment_name", "honoured"),
        ("wandb_name: x", "wandb_name", "without effect"),
        ("wandb_name: x\nwandb_project: y", "wandb_name", "honoured"),
        ("gradient_checkpointing_kwargs: {use_reentrant: true}", "gradient_checkpointing_kwargs", "without effect"),
        ("bnb_config_kwargs: {bnb_4bit_quant_type: fp4}", "bnb_config_kwargs", "without effect"),
        ("bnb_config_kwargs: {bnb_4bit_quant_type: fp4}\nadapter: qlora", "bnb_config_kwargs", "honoured"),
        ("loraplus_lr_embedding: 1e-6", "loraplus_lr_embedding", "without effect"),
        ("torch_compile: true", "torch_compile", "without effect"),
    ],
)
def test_a_key_whose_neighbour_is_off_is_said_to_do_nothing(lines: str, key: str, kind: str) -> None:
    found, note = fate(read(lines), key)
    assert found == kind
    assert note


@pytest.mark.parametrize(
    ("entry", "key", "kind"),
    [
        ("type: alpaca, field_messages: x", "field_messages", "without effect"),
        ("type: alpaca, field_output: x", "field_output", "honoured"),
        ("type: alpaca, train_on_eos: last", "train_on_eos", "without effect"),
        ("type: instruction, train_on_eos: last", "train_on_eos", "honoured"),
        ("type: chat_template, field_output: x", "field_output", "without effect"),
        ("type: sharegpt, roles: {user: human}", "roles", "honoured"),
        ("type: completion, field: body", "field", "honoured"),
        ("type: tokens, field: body", "field", "without effect"),
        ("field_output: x", "field_output", "honoured"),  # the rows will tell
        ("field_chosen: x", "field_chosen", "without effect"),
        (
            "type: {field_instruction: q, format: '{instruction}'}, roles_to_train: user",
            "roles_to_train",
            "without effect",
        ),
        ("type: {field_instruction: q}, roles_to_train: user", "roles_to_train", "honoured"),
    ],
)
def test_a_column_that_the_type_does_not_read_is_said_to_do_nothing(entry: str, key: str, kind: str) -> None:
    found, note = fate(read(f"test_datasets: [{{path: a, {entry}}}]"), f"test_datasets[0].{key}")
    assert found == kind
    assert note


def test_a_global_batch_sets_the_accumulation() -> None:
    reading = read("batch_size: 16\nmicro_batch_size: 2")
    assert reading.config.gradient_accumulation_steps == 8
    assert fate(reading, "batch_size") == ("honoured", "16: gradient_accumulation_steps is 8")


def test_a_template_of_all_data_sets_is_the_config_s() -> None:
    config = read("test_datasets: [{path: a, chat_template: llama3}]").config
    assert config.chat_template == "llama3"
    assert read_config(parse_yaml(config.to_yaml(), source="again"), machine=Machine()).config == config


def test_one_of_the_two_names_of_the_end_of_a_turn_counts() -> None:
    reading = read("test_datasets: [{path: a, train_on_eos: all, train_on_eot: last}]")
    assert fate(reading, "test_datasets[0].train_on_eos")[0] == "without effect"
    assert fate(reading, "test_datasets[0].train_on_eot") == ("honoured", "last")


@pytest.mark.parametrize(("theirs", "ours"), sorted(ALSO_CALLED.items()))
def test_other_programs_names_are_answered_with_the_right_key(theirs: str, ours: str) -> None:
    assert ours in known_keys()
    assert theirs not in known_keys()
    with pytest.raises(ConfigError) as caught:
        read(f"{theirs}: 7")
    assert caught.value.why == f"did you mean {ours}?"


def test_every_named_template_writes_both_roles_and_its_own_tokens() -> None:
    assert not set(templates.NAMED) & set(templates.OWN)
    for name, template in templates.NAMED.items():
        assert templates.known(name)
        assert all(token in template.text for token in template.tokens if "|user|" not in token), name


@pytest.mark.slow
def test_the_configuration_that_everybody_has_runs_unchanged(
    ah: Ah, write_rows: Writer, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"from": "human", "value": "Say {i}."}, {"from": "gpt", "value": "Ahoy, {i}!"}]
    write_rows(
        {"conversations": [{**turn, "value": turn["value"].replace("{i}", str(i))} for turn in turns]}
        for i in range(16)
    )
    (tmp_path / "config.yml").write_text(SEED.format(base=tiny_base))
    monkeypatch.chdir(tmp_path)
    done = ah("train", "config.yml", "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["steps"] == 3
    assert (Path(answer["adapter"]) / "adapter_model.safetensors").is_file()
