"""Training: a YAML file and a JSONL become an adapter directory, or the reason why not within seconds.

    from pathlib import Path
    from adapterhub.trainers import prepare, read_config, read_yaml, train

    reading = read_config(read_yaml(Path("config.yml")))     # strict: every key has a fate
    prepared = prepare(reading.config)                       # data read, labels made; no weight loaded
    result = train(reading, prepared, on_event=print)        # result.adapter is a PEFT directory

A training passes through these files, in this order:

    yamlfile → dialect → config   keys with their places; Axolotl's names; a frozen TrainConfig
    data → labels → prepare       rows, named by file:line; which tokens are trained on; the checks
    sft (with watch and quiet)    the trainer, its events, its silence
    run → report                  the folder it leaves behind

Trainers know no registry: `ah publish RUN` reads the folder's ``run.json`` (`adapterhub.runrecord`). Importing this
package imports no torch.
"""

from adapterhub.trainers.config import DataSource, Reading, TrainConfig, read_config
from adapterhub.trainers.prepare import Prepared, prepare
from adapterhub.trainers.run import Result, read_run, resume, run_folder, train
from adapterhub.trainers.watch import Interrupted
from adapterhub.trainers.yamlfile import YamlFile, parse_yaml, read_yaml

__all__ = [
    "DataSource",
    "Interrupted",
    "Prepared",
    "Reading",
    "Result",
    "TrainConfig",
    "YamlFile",
    "parse_yaml",
    "prepare",
    "read_config",
    "read_run",
    "read_yaml",
    "resume",
    "run_folder",
    "train",
]
