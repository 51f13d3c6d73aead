"""The dialect: Axolotl's key names, read strictly, so that nothing in a config is silently ignored.

    yamlfile   YAML with the line and column of every key
    values     what a key may hold            keys     the tables of keys
    sharding   what DeepSpeed's and FSDP's may hold
    noted      keys of Axolotl's that do nothing here, and other programs' names of ours
    rules      what becomes of a key whose fate depends on its value, its neighbours or the machine
    columns    which keys of a data set its type reads
    reading    one pass over a file: a `TrainConfig`, and the fate of every key
    meanings   each key in one line           schema, explain   the dialect for editors and for people

A new key is a field of `trainers.config.TrainConfig`, a line in `keys.KEYS` and `meanings.KEYS`, and a rule only where
it is not simply honoured.
"""

from adapterhub.trainers.dialect.fate import KeyFate, Machine
from adapterhub.trainers.dialect.reading import Reading, read_config
from adapterhub.trainers.dialect.yamlfile import YamlFile, parse_yaml, read_yaml

__all__ = ["KeyFate", "Machine", "Reading", "YamlFile", "parse_yaml", "read_config", "read_yaml"]
