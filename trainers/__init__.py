"""Training: a YAML file and a JSONL become an adapter directory, or the reason why not within seconds.

    from pathlib import Path
    from adapterhub.trainers import prepare, read_config, read_yaml, train

    reading = read_config(read_yaml(Path("config.yml")))     # strict: every key has a fate
    prepared = prepare(reading.config)                       # data read, labels made; no weight loaded
    result = train(reading, prepared, on_event=print)        # result.adapter is a PEFT directory

A training passes through these files, in this order:

    dialect/ → config             keys with their places; Axolotl's names; a frozen TrainConfig
    data/                         rows, named by file:line
    labels/                       which tokens are trained on, and that serving writes the same
    prepare (checks, room)        all of these, and the advice: everything before a weight is loaded
    fit (model, arguments)        the base with a LoRA on it, and its trainer from methods/
    watch and quiet               the trainer's events and its silence
    run → report                  the folder it leaves behind
    launch, onray                 the same in several processes, here or on a Ray cluster

Beside that way: planning/ says what it will take, from the base's config.json alone; evaluation/ how good it became.

Trainers know no registry: `ah publish RUN` reads the folder's ``run.json`` (`adapterhub.runrecord`). Importing this
package imports no torch.
"""

from adapterhub.trainers.config import DataSource, TrainConfig
from adapterhub.trainers.dialect import Machine, Reading, YamlFile, parse_yaml, read_config, read_yaml
from adapterhub.trainers.planning.plan import Plan, base_config, plan
from adapterhub.trainers.prepare import Prepared, prepare
from adapterhub.trainers.run import Result, read_run, resume, run_folder, train
from adapterhub.trainers.watch import Interrupted

__all__ = [
    "DataSource",
    "Interrupted",
    "Machine",
    "Plan",
    "Prepared",
    "Reading",
    "Result",
    "TrainConfig",
    "YamlFile",
    "base_config",
    "parse_yaml",
    "plan",
    "prepare",
    "read_config",
    "read_run",
    "read_yaml",
    "resume",
    "run_folder",
    "train",
]
