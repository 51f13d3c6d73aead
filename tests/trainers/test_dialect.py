"""The dialect is read strictly, and every key is accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from adapterhub.errors import ConfigError, InvalidName
from adapterhub.trainers.data.formats import FORMATS
from adapterhub.trainers.dialect import Machine, Reading, parse_yaml, read_config, read_yaml
from adapterhub.trainers.dialect.keys import KEYS, TYPES, UNSERVABLE, UNSUPPORTED
from adapterhub.trainers.dialect.noted import NO_EFFECT
from tests.trainers.conftest import SEED as CONFIG

SMALLEST = "base_model: x\ndatasets: [{path: train.jsonl}]\n"
SEED = CONFIG.format(base="meta-llama/Llama-2-7b-hf")


def read(text: str, *, gpu: bool = False, **options: Any) -> Reading:
    return read_config(parse_yaml(text, source="config.yml"), machine=Machine(gpu=gpu), **options)


def fates(reading: Reading) -> dict[str, str]:
    return {fate.key: fate.kind for fate in reading.fates}


def test_the_smallest_config_has_axolotls_defaults() -> None:
    config = read(SMALLEST).config
    assert (config.lora_r, config.lora_alpha, config.sequence_len, config.micro_batch_size) == (16, 32, 512, 1)
    assert (config.lora_target_modules, config.num_epochs, config.lr_scheduler) == ("all-linear", 1, "cosine")


def test_a_common_axolotl_file_passes_and_every_key_has_a_fate() -> None:
    reading = read(SEED)
    config = reading.config
    assert config.learning_rate == 2e-4  # YAML takes 2e-4 for text
    assert config.lora_target_modules == ("q_proj", "v_proj")
    assert config.attn_implementation == "sdpa"
    found = fates(reading)
    given = yaml.safe_load(SEED)
    assert set(found) >= set(given) - {"datasets"}
    for key in ("flash_attention", "bf16", "optimizer"):
        assert found[key] == "approximated"
    assert all(fate.where.startswith("config.yml:") for fate in reading.fates)


def test_a_gpu_takes_the_same_file_at_its_word() -> None:
    reading = read(SEED, gpu=True)
    assert reading.config.attn_implementation == "flash_attention_2"
    assert reading.config.optimizer == "adamw_bnb_8bit"
    assert "approximated" not in fates(reading).values()


def test_a_cpu_that_multiplies_bfloat16_does() -> None:
    for machine, kind, used in (
        (Machine(bf16=True), "honoured", True),
        (Machine(bf16=False), "approximated", False),
    ):
        reading = read_config(parse_yaml(SEED, source="config.yml"), machine=machine)
        assert (fates(reading)["bf16"], reading.config.bf16) == (kind, used)
        assert read_config(parse_yaml(SMALLEST, source="config.yml"), machine=machine).config.bf16 is used
        off = read_config(parse_yaml(SMALLEST + "bf16: false", source="config.yml"), machine=machine)
        assert (fates(off)["bf16"], off.config.bf16) == ("honoured", False)


@pytest.mark.parametrize(("task", "rank"), [("style", 8), ("domain", 16), ("reasoning", 64), ("full", 128)])
def test_a_task_sets_the_rank(task: str, rank: int) -> None:
    assert read(SMALLEST + f"adapterhub: {{task: {task}}}").config.lora_r == rank
    assert read(SMALLEST + f"lora_r: 3\nadapterhub: {{task: {task}}}").config.lora_r == 3


def test_null_is_unset() -> None:
    reading = read(SMALLEST + "lora_r:\nwandb_project:\ndeepspeed: null\nno_such_key: null\n")
    assert reading.config.lora_r == 16
    assert not {"lora_r", "wandb_project", "deepspeed"} & set(fates(reading))


@pytest.mark.parametrize(
    ("line", "where", "why"),
    [
        ("lora_rr: 4", "config.yml:3:1", "did you mean lora_r?"),
        ("learning_rat: 4", "config.yml:3:1", "did you mean learning_rate?"),
        ("adapterhub: {nam: a/b}", "config.yml:3:14", "did you mean name?"),
        ("test_datasets: [{path: a, typ: b}]", "config.yml:3:27", "did you mean type?"),
        ("zzzzzzzz: 1", "config.yml:3:1", "neither"),
    ],
)
def test_an_unknown_key_is_refused_with_its_place_and_a_suggestion(line: str, where: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(SMALLEST + line)
    assert caught.value.what.startswith(where + ": unknown key")
    assert why in caught.value.why


def test_unknown_keys_can_be_noted_instead() -> None:
    reading = read(SMALLEST + "lora_rr: 4", allow_unknown_keys=True)
    assert fates(reading)["lora_rr"] == "without effect"
    assert "did you mean lora_r?" in next(f.note for f in reading.fates if f.key == "lora_rr")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lora_r: many", "a whole number from 1 to 512"),
        ("lora_r: 0", "a whole number from 1 to 512"),
        ("lora_r: 1024", "a whole number from 1 to 512"),
        ("lora_r: true", "a whole number from 1 to 512"),
        ("lora_alpha: 0", "a number above 0"),
        ("lora_dropout: 1.5", "a number from 0 to 0.99"),
        ("learning_rate: .inf", "a number above 0 to 1"),
        ("learning_rate: .nan", "a number above 0 to 1"),
        ("learning_rate: fast", "a number above 0 to 1"),
        ("train_on_inputs: 3", "true or false"),
        ("lr_scheduler: sinus", "one of cosine"),
        ("optimizer: muon", "one of adamw_torch"),
        ("adapter: dora", "one of lora, qlora"),
        ("lora_target_modules: []", "a list of names"),
        ("lora_target_modules: q_proj, v_proj", "a list: [q_proj, v_proj]"),
        ("lora_target_modules: '*_proj'", "a regular expression"),
        ("test_datasets: eval.jsonl", "a list like"),
        ("adapterhub: acme/support", "lines like"),
        ("adapterhub: {labels: [a]}", "lines like"),
        ("save_strategy: sometimes", "no, steps or epoch"),
        ("max_steps: 0", "a whole number from 1"),
        ("lora_rank_pattern: {q_proj: 0}", "a whole number from 1"),
        ("lora_rank_pattern: {'(': 2}", "regular expressions"),
        ("peft_layers_to_transform: [-1]", "layer indices"),
        ("loraplus_lr_ratio: 0.5", "a number from 1"),
        ("test_datasets: [{path: a, type: alpacca}]", "one of chat_template"),
        ("test_datasets: [{path: a, roles_to_train: [gpt]}]", "a list of system"),
        ("test_datasets: [{path: a, train_on_eos: often}]", "one of turn, all, last, none"),
        ("test_datasets: [{path: a, message_property_mappings: {roll: from}}]", "unknown property 'roll'"),
        ("test_datasets: [{path: a, type: {format: x}}]", "format does not write the instruction"),
        ("test_datasets: [{path: a, type: {formt: x}}]", "unknown key 'formt'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_what_was_expected(line: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(SMALLEST + line)
    assert caught.value.what.startswith("config.yml:3:")
    assert expected in caught.value.what


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("lora_r: [1", "config.yml:1:11"),
        ("a: b\n  c: d\n", "config.yml:2:4"),
        ("a: 'x", "config.yml:1:6"),
        ("base_model: x\nbase_model: y\n", "config.yml:2:1: the key 'base_model' is there twice"),
        ("- a\n- b\n", "config.yml:1:1: the file is no mapping"),
        ("", "config.yml is empty"),
        ("# nothing\n", "config.yml is empty"),
        ("? [a, b]\n: c\n", "config.yml:1:3: a key must be a word"),
        ("base_model: \x07", "config.yml is not YAML"),
        ("base_model: \x00", "config.yml is not YAML"),
        ("a: !!python/object/apply:os.system [true]\n", "config.yml:1:4"),
    ],
)
def test_broken_yaml_is_refused_with_line_and_column(text: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert caught.value.what.startswith(what)


def test_an_alias_of_itself_is_no_endless_walk() -> None:
    with pytest.raises(ConfigError, match="datasets expects a list"):
        read("base_model: x\ndatasets: &a [*a]\n")


@pytest.mark.parametrize("missing", ["base_model", "datasets"])
def test_what_must_be_there_is_asked_for(missing: str) -> None:
    kept = "".join(line + "\n" for line in SMALLEST.splitlines() if not line.startswith(missing))
    with pytest.raises(ConfigError, match=f"{missing} is missing"):
        read(kept)


@pytest.mark.parametrize("key", sorted(UNSUPPORTED))
def test_a_key_that_is_not_supported_is_refused_unless_it_is_off(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is not supported"):
        read(SMALLEST + f"{key}: 7")
    assert fates(read(SMALLEST + f"{key}: false"))[key] == "honoured"


@pytest.mark.parametrize("key", sorted(UNSERVABLE))
def test_what_cannot_be_served_is_refused_before_it_is_trained(key: str) -> None:
    with pytest.raises(ConfigError, match="cannot be served") as caught:
        read(SMALLEST + f"{key}: [x]")
    assert caught.value.why


def test_an_adapter_on_the_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="an adapter on lm_head cannot be served"):
        read(SMALLEST + "lora_target_modules: [q_proj, lm_head]")


@pytest.mark.parametrize("key", [*NO_EFFECT, "wandb_watch", "liger_rope", "mlflow_run_name"])
def test_a_key_without_effect_is_said_to_have_none(key: str) -> None:
    reading = read(SMALLEST + f"{key}: 1")
    assert fates(reading)[key] == "without effect"
    assert next(f.note for f in reading.fates if f.key == key)


def test_every_type_of_the_dialect_has_a_reader() -> None:
    assert {*FORMATS, "alpaca_chat.load_qa"} == set(TYPES)


def test_no_key_stands_in_two_tables() -> None:
    tables = [KEYS, NO_EFFECT, UNSUPPORTED, UNSERVABLE]
    assert sum(map(len, tables)) == len(set().union(*tables))


@pytest.mark.parametrize(
    "lines",
    [
        "adapter: qlora\nload_in_4bit: false",
        "load_in_4bit: true",
        "lora_target_modules: .*proj\npeft_layers_to_transform: [0]",
        "adapter: qlora\nload_in_8bit: true",
        "val_set_size: 0.1\ntest_datasets: [{path: a}]",
        "chat_template: jinja",
        "chat_template_jinja: a.jinja",
        "eval_steps: 5\nevals_per_epoch: 2",
        "bf16: true\nfp16: true",
    ],
)
def test_keys_that_contradict_each_other_are_refused(lines: str) -> None:
    with pytest.raises(ConfigError, match="contradicts"):
        read(SMALLEST + lines)


@pytest.mark.parametrize("name", ["../x", "acme", "acme/a b", "ACME/x", "acme/" + "x" * 64, "acme/base"])
def test_a_name_outside_the_grammar_is_refused(name: str) -> None:
    with pytest.raises(InvalidName, match=r"config\.yml:3:14"):
        read(SMALLEST + f"adapterhub: {{name: {name!r}}}")


def test_flags_win_over_the_file_and_are_named_in_errors() -> None:
    flags = {"lora_r": ("--rank", 8), "adapterhub.name": ("--name", "acme/support")}
    reading = read(SMALLEST + "lora_r: 4", flags=flags)
    assert reading.config.lora_r == 8
    assert str(reading.config.name) == "acme/support"
    assert next(f.where for f in reading.fates if f.key == "lora_r") == "--rank"
    assert yaml.safe_load(reading.given)["lora_r"] == 8
    with pytest.raises(ConfigError, match="--rank: lora_r expects"):
        read(SMALLEST, flags={"lora_r": ("--rank", 0)})
    with pytest.raises(InvalidName, match="--name"):
        read(SMALLEST, flags={"adapterhub.name": ("--name", "nope")})


@pytest.mark.parametrize(
    "extra",
    [
        "",
        "adapterhub: {name: acme/support, task: full, channel: canary, labels: {team: a}, description: Hé}\n",
        "adapterhub: {skip_bad_rows: 3}\n",
        "adapter: qlora\nlora_target_modules: [q_proj]\nval_set_size: 0.25\nspecial_tokens: {pad_token: x}\n",
        "lora_rank_pattern: {q_proj: 2}\npeft_layers_to_transform: [0]\nloraplus_lr_ratio: 16\nload_in_8bit: true\n",
        "test_datasets: [{path: e, type: alpaca, field_system: s, train_on_eos: last, roles_to_train: [user]}]\n",
        "test_datasets: [{path: a/b, name: x, split: 'train[:5%]', data_files: e.jsonl, revision: main}]\n",
        "test_datasets: [{path: e, message_property_mappings: {role: from}, drop_system_message: true}]\n",
        "test_datasets: [{path: e, type: {field_instruction: q, field_output: a, format: 'Q {instruction}'}}]\n",
        "lora_target_modules: .*proj\nlora_target_linear: false\ntest_datasets: [{path: e, roles: {user: [human]}}]\n",
    ],
)
def test_a_resolved_config_reads_as_itself(extra: str) -> None:
    first = read(SMALLEST + extra).config
    assert read(first.to_yaml()).config == first


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "none.yml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_yaml(tmp_path / "binary.yml")


def test_trackers_are_gathered_from_all_their_keys() -> None:
    found = read(SMALLEST + "wandb_project: x\nuse_tensorboard: true\nreport_to: [mlflow, none]").config
    assert found.report_to == ("tensorboard", "mlflow", "wandb")
    assert read(SMALLEST + "wandb_project: x\nuse_wandb: false").config.report_to == ()
    with pytest.raises(ConfigError, match="report_to expects none, or some of tensorboard"):
        read(SMALLEST + "report_to: paper")


def test_keeping_the_best_saves_at_evaluations() -> None:
    reading = read(SMALLEST + "val_set_size: 0.1\nearly_stopping_patience: 2\nevals_per_epoch: 4\nsave_strategy: epoch")
    config = reading.config
    assert (config.load_best_model_at_end, config.eval_strategy, config.save_strategy) == (True, "steps", "steps")
    assert config.saves_per_epoch == 4
    assert fates(reading)["save_strategy"] == "approximated"
    with pytest.raises(ConfigError, match="early_stopping_patience contradicts val_set_size"):
        read(SMALLEST + "early_stopping_patience: 2")


PAIRS = "base_model: x\nrl: {}\ndatasets: [{{path: pairs.jsonl}}]\n"


@pytest.mark.parametrize("method", ["dpo", "ipo", "orpo", "simpo"])
def test_a_preference_method_is_honoured(method: str) -> None:
    reading = read(PAIRS.format(method))
    assert (reading.config.rl, fates(reading)["rl"]) == (method, "honoured")


def test_kto_needs_more_than_one_row_a_batch() -> None:
    with pytest.raises(ConfigError, match="rl contradicts micro_batch_size") as caught:
        read(PAIRS.format("kto"))
    assert "set micro_batch_size to 2 or more" in caught.value.why
    assert read(PAIRS.format("kto") + "micro_batch_size: 2\n").config.rl == "kto"


def test_a_key_of_another_method_is_said_to_do_nothing() -> None:
    reading = read(PAIRS.format("dpo") + "orpo_alpha: 0.2\ndpo_label_smoothing: 0.1\n")
    assert fates(reading)["orpo_alpha"] == "without effect"
    assert fates(reading)["dpo_label_smoothing"] == "honoured"
    assert fates(read(SMALLEST + "rl_beta: 0.1\n"))["rl_beta"] == "without effect"


def test_what_would_disturb_a_comparison_is_off_and_said() -> None:
    reading = read(PAIRS.format("dpo") + "lora_dropout: 0.05\ntrain_on_inputs: true\n")
    assert (reading.config.lora_dropout, reading.config.train_on_inputs) == (0.0, False)
    assert {fates(reading)[key] for key in ("lora_dropout", "train_on_inputs")} == {"without effect"}


def test_the_type_of_preference_rows_names_their_template() -> None:
    text = "base_model: x\nrl: dpo\ndatasets: [{path: a, type: llama3.ultra}]\n"
    assert read(text).config.chat_template == "llama3"
    with pytest.raises(ConfigError, match="chat_template contradicts datasets"):
        read(text + "chat_template: chatml\n")
    with pytest.raises(ConfigError, match="chat_template contradicts datasets"):
        read(text + "test_datasets: [{path: b, type: chatml.ultra}]\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PAIRS.format("dop"), "rl expects one of"),
        (PAIRS.format("dpo") + "sample_packing: true\n", "rl contradicts sample_packing"),
        (PAIRS.format("ipo") + "dpo_loss_type: hinge\n", "dpo_loss_type contradicts rl"),
        (PAIRS.format("dpo") + "dpo_loss_type: [sigmoid, sft]\ndpo_loss_weights: 1\n", "dpo_loss_weights contradicts"),
        (PAIRS.format("dpo") + "dpo_loss_type: exo_pair\n", "dpo_loss_type contradicts dpo_label_smoothing"),
        (PAIRS.format("dpo") + "dpo_loss_type: sigmod\n", "dpo_loss_type expects some of"),
        (PAIRS.format("dpo") + "peft_init_lora_weights: pissa\n", "peft_init_lora_weights contradicts rl"),
        (SMALLEST + "peft_init_lora_weights: olora\nadapter: qlora\n", "peft_init_lora_weights contradicts adapter"),
        (SMALLEST + "peft_init_lora_weights: pissa\nlora_r: 300\n", "peft_init_lora_weights contradicts lora_r"),
        (SMALLEST + "peft_init_lora_weights: loftq\n", "peft_init_lora_weights expects"),
        (SMALLEST + "peft_use_dora: true\n", "peft_use_dora cannot be served"),
        ("base_model: x\ndatasets: [{path: a, type: llama3.intel}]\n", "type llama3.intel is for preference training"),
        ("base_model: x\nrl: dpo\ndatasets: [{path: a, type: alpaca}]\n", "type alpaca is for supervised training"),
        ("base_model: x\nrl: dpo\ndatasets: [{path: a, type: {prompt_format: 'Q'}}]\n", "does not write the prompt"),
    ],
)
def test_a_method_that_cannot_work_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(text)


def test_dora_is_trained_where_it_is_asked_for_without_serving() -> None:
    reading = read(SMALLEST + "peft_use_dora: true\nadapterhub: {allow_unservable: true}\n")
    assert reading.config.peft_use_dora
    assert "adapterhub.allow_unservable" in fates(reading)


def test_the_adapter_to_go_on_from_keeps_its_own_shape() -> None:
    reading = read(SMALLEST + "lora_model_dir: runs/a\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n")
    assert fates(reading)["lora_model_dir"] == "honoured"
    assert {fates(reading)[key] for key in ("lora_r", "lora_alpha", "lora_target_linear")} == {"without effect"}
