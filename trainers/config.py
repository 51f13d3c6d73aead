"""What a training runs with, every default filled in: a frozen `TrainConfig`, read from YAML by `trainers.dialect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from dataclasses import field as dict_field
from typing import Any, Literal

import yaml

from adapterhub.refs import AdapterName

Task = Literal["style", "domain", "reasoning", "full"]
Method = Literal["dpo", "ipo", "kto", "orpo", "simpo"]

RANKS: Mapping[str, int] = {"style": 8, "domain": 16, "reasoning": 64, "full": 128}
BLOCK = (
    "name",
    "task",
    "channel",
    "description",
    "labels",
    "skip_bad_rows",
    "num_processes",
    "allow_unservable",
)  # keys of the adapterhub: block
MESSAGE_PROPERTIES = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")
ALPHA = 32.0  # fixed, so that the best learning rate does not move with the rank (LoRA Without Regret)


@dataclass(frozen=True)
class UserFormat:
    """A format that the config spells out: which columns, and how they are written as text.

    ``{instruction}``, ``{input}`` and ``{system}`` stand for a row's columns. Without ``format`` a row becomes a
    conversation.
    """

    field_instruction: str | None = None
    field_input: str | None = None
    field_output: str | None = None
    field_system: str | None = None
    format: str | None = None
    no_input_format: str | None = None  # None: format
    system_format: str = "{system}"
    system_prompt: str = ""  # for rows without one of their own


@dataclass(frozen=True)
class UserPreference:
    """Preference data that the config spells out; ``{prompt}``, ``{system}`` and the like stand for the columns.

    Without ``prompt_format`` a row becomes a conversation.
    """

    field_prompt: str | None = None
    field_system: str | None = None
    field_chosen: str | None = None
    field_rejected: str | None = None
    field_completion: str | None = None
    field_label: str | None = None
    prompt_format: str | None = None
    chosen_format: str = "{chosen}"
    rejected_format: str = "{rejected}"
    completion_format: str = "{completion}"


@dataclass(frozen=True)
class DataSource:
    """One entry of ``datasets``. ``type`` None: told from the rows, and said."""

    path: str
    type: str | UserFormat | UserPreference | None = None
    name: str | None = None  # name, split, data_files and revision: of a data set of the Hub
    split: str | None = None  # None: train
    data_files: tuple[str, ...] = ()
    revision: str | None = None
    ds_type: str | None = None  # json, csv or parquet; None: told from the file
    field: str | None = None  # of plain text; None: text
    field_messages: str | None = None  # None: messages, or conversations for ShareGPT
    field_tools: str = "tools"
    field_system: str | None = None
    field_instruction: str | None = None
    field_input: str | None = None
    field_output: str | None = None
    field_prompt: str | None = None  # these five of preference data
    field_chosen: str | None = None
    field_rejected: str | None = None
    field_completion: str | None = None
    field_label: str | None = None
    message_property_mappings: Mapping[str, str] = dict_field(default_factory=dict)  # ours → theirs: role → from
    roles: Mapping[str, str] = dict_field(default_factory=dict)  # role in the file → role of the template
    roles_to_train: tuple[str, ...] = ("assistant",)
    train_on_eos: Literal["turn", "all", "last", "none"] = "turn"  # of which turns the end token is trained on
    train_on_eot: Literal["turn", "all", "last", "none"] | None = None  # Axolotl's second name for it; wins
    chat_template: str | None = None  # as the whole config's: all data sets have one
    chat_template_jinja: str | None = None
    message_field_training: str | None = None  # a message's own switch; None: weight, as OpenAI has it
    drop_system_message: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """What a training runs with. Fields carry Axolotl's names and meaning; None: decided when the base is at hand."""

    base_model: str
    datasets: tuple[DataSource, ...]
    test_datasets: tuple[DataSource, ...] = ()
    # the adapterhub: block
    name: AdapterName | None = None
    task: Task | None = None
    channel: str | None = None
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    skip_bad_rows: int = 0  # of all data files together
    num_processes: int = 1  # each takes micro_batch_size rows a step
    allow_unservable: bool = False  # train what only `ah export` can use
    # model
    model_revision: str | None = None
    tokenizer_config: str | None = None  # a folder or Hub id whose tokenizer, of the same words, is used
    trust_remote_code: bool = False
    attn_implementation: str = "sdpa"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_config_kwargs: Mapping[str, Any] = field(default_factory=dict)  # of transformers' BitsAndBytesConfig
    bf16: bool | Literal["auto"] = "auto"
    fp16: bool | Literal["auto"] = False
    tf32: bool = False
    # LoRA
    lora_r: int = RANKS["domain"]
    lora_alpha: float = ALPHA
    lora_dropout: float = 0.0
    lora_target_modules: tuple[str, ...] | str = "all-linear"
    peft_use_rslora: bool = False
    peft_use_dora: bool = False
    peft_init_lora_weights: bool | str = True
    lora_model_dir: str | None = None  # the adapter to go on from: a folder, or a version by its digest
    lora_rank_pattern: Mapping[str, int] = field(default_factory=dict)  # module → rank, by PEFT's rule
    lora_alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    peft_layers_to_transform: tuple[int, ...] | None = None
    lora_fan_in_fan_out: bool = False  # weights are stored (in, out), as GPT-2's
    loraplus_lr_ratio: float | None = None  # rate of B over that of A (LoRA+, arXiv:2402.12354)
    # preferences
    rl: Method | None = None  # None: supervised fine-tuning
    rl_beta: float | None = None  # None: 0.1; of SimPO 2
    dpo_loss_type: tuple[str, ...] = ()  # none: sigmoid; of IPO ipo
    dpo_loss_weights: tuple[float, ...] = ()
    dpo_label_smoothing: float = 0.0
    precompute_ref_log_probs: bool = False
    kto_desirable_weight: float = 1.0
    kto_undesirable_weight: float = 1.0
    orpo_alpha: float = 0.1  # weight of the odds ratio beside the likelihood
    simpo_gamma: float = 0.5  # the margin that is wanted
    cpo_alpha: float = 0.0  # weight of the likelihood beside SimPO's loss
    # data
    val_set_size: float = 0.0
    train_on_inputs: bool = False
    sequence_len: int = 512
    excess_length_strategy: Literal["drop", "truncate"] = "drop"
    shuffle_merged_datasets: bool = True
    dataset_exact_deduplication: bool = False  # rows that are there already are left out, of both splits
    sample_packing: bool = False
    group_by_length: bool = False
    chat_template: str = "tokenizer_default"
    chat_template_jinja: str | None = None
    default_system_message: str | None = None  # for conversations without a system message
    eot_tokens: tuple[str, ...] = ()  # tokens that end a turn; none: told from the template and the base
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    # optimiser
    micro_batch_size: int = 1
    eval_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    num_epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float | None = None
    optimizer: str = "adamw_torch_fused"
    optim_args: Mapping[str, Any] = field(default_factory=dict)
    lr_scheduler: str = "cosine"
    lr_scheduler_kwargs: Mapping[str, Any] = field(default_factory=dict)
    cosine_min_lr_ratio: float | None = None
    warmup_steps: int | None = None  # None: 3 % of the steps, at most 100
    warmup_ratio: float | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    neftune_noise_alpha: float | None = None
    # run
    output_dir: str | None = None
    seed: int = 42
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: Mapping[str, bool] = field(default_factory=dict)
    logging_steps: int = 1
    eval_strategy: str = "no"  # during training; the final evaluation is always made where there is data for it
    eval_steps: float | None = None
    evals_per_epoch: int | None = None
    save_strategy: str = "epoch"
    save_steps: float | None = None
    saves_per_epoch: int | None = None
    save_total_limit: int = 4
    load_best_model_at_end: bool = False  # the checkpoint of the lowest evaluation loss becomes the adapter
    early_stopping_patience: int | None = None  # evaluations without a lower loss before the run ends
    loss_watchdog_threshold: float | None = None  # a loss above it …
    loss_watchdog_patience: int = 3  # … for so many logged steps in a row ends the run
    report_to: tuple[str, ...] = ()  # trackers, by transformers' names
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_name: str | None = None
    mlflow_tracking_uri: str | None = None
    mlflow_experiment_name: str | None = None

    # more than one process
    deepspeed: str | Mapping[str, Any] | None = None  # a JSON file, or what it holds
    fsdp: tuple[str, ...] = ()
    fsdp_config: Mapping[str, Any] = field(default_factory=dict)  # keys without Axolotl's fsdp_ before them
    fsdp_version: int | None = None
    use_ray: bool = False
    ray_num_workers: int = 1
    resources_per_worker: Mapping[str, float] = field(default_factory=dict)  # {CPU: 4, GPU: 1}

    def to_yaml(self) -> str:
        """As a config that trains the same again."""
        plain = asdict(self) | {"name": str(self.name) if self.name else None}
        block = {key: plain.pop(key) for key in BLOCK}
        for key in ("datasets", "test_datasets"):
            plain[key] = [_source_to_plain(source) for source in getattr(self, key)]
        if self.lora_target_modules == "all-linear":
            plain["lora_target_modules"], plain["lora_target_linear"] = None, True
        plain["adapter"] = "qlora" if self.load_in_4bit else "lora"
        kept = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items() if v not in (None, {}, [], ())}
        kept["adapterhub"] = {k: v for k, v in block.items() if v not in (None, {}, "", False)}
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=120)


def _source_to_plain(source: DataSource) -> dict[str, Any]:
    usual = asdict(DataSource(path=source.path))
    plain = {k: v for k, v in asdict(source).items() if k == "path" or v != usual[k]}
    if isinstance(source.type, UserFormat | UserPreference):
        plain["type"] = {k: v for k, v in asdict(source.type).items() if v is not None}
    plain |= {key: list(value) for key, value in plain.items() if isinstance(value, tuple)}
    if source.roles:
        plain["roles"] = {}
        for name, target in source.roles.items():
            plain["roles"].setdefault(target, []).append(name)
    return plain
