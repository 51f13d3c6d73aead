"""YAML with places: every key and list item remembers its line and column. Duplicate keys are errors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from adapterhub.errors import ConfigError

Path_ = tuple[str | int, ...]  # the way to a value: ("datasets", 0, "type")


@dataclass(frozen=True)
class YamlFile:
    """A mapping read from a file, and where each of its keys stands."""

    source: str  # file name, as it was typed
    values: Mapping[str, Any]
    text: str = ""
    places: Mapping[Path_, tuple[int, int]] = field(default_factory=dict)  # line and column, from 1

    def where(self, path: Path_) -> str:
        """``config.yml:3:1``; the nearest enclosing place where the value itself has none."""
        while path and path not in self.places:
            path = path[:-1]
        if not path:
            return self.source
        line, column = self.places[path]
        return f"{self.source}:{line}:{column}"


def read_yaml(path: Path) -> YamlFile:
    """Read a configuration file.

    Raises:
        ConfigError: it is missing, not UTF-8, not YAML (with line and column), has a key twice, or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8", why=f"byte {error.start}: {error.reason}") from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read",
            why=error.strerror or str(error),
            hint="name a config file, or train from flags: ah train --base B --data train.jsonl --name acme/support",
        ) from error
    return parse_yaml(text, source=str(path))


def parse_yaml(text: str, *, source: str) -> YamlFile:
    """Like `read_yaml`, from text. Raises ConfigError."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{source} is empty", hint="write at least base_model and datasets")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                f"{source}:1:1: the file is no mapping", why="a config is made of lines like `lora_r: 16`"
            )
        places: dict[Path_, tuple[int, int]] = {}
        _walk(node, (), places, source, seen=set())
        values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(
            f"{where}: this is not YAML",
            why=" ".join(filter(None, (error.context, error.problem))),
            hint="check the indentation and the quotes there",
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source} is not YAML", why=str(error).splitlines()[0]) from error
    return YamlFile(source=source, values=values, text=text, places=places)


def _walk(node: yaml.Node, path: Path_, places: dict[Path_, tuple[int, int]], source: str, seen: set[int]) -> None:
    if id(node) in seen:  # an alias: its place is the anchor's, and it may be its own ancestor
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            places[(*path, i)] = _place(item)
            _walk(item, (*path, i), places, source, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[Hashable, tuple[int, int]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                line, column = _place(key)
                raise ConfigError(f"{source}:{line}:{column}: a key must be a word")
            if key.value in first and key.tag != "tag:yaml.org,2002:merge":
                line, column = _place(key)
                raise ConfigError(
                    f"{source}:{line}:{column}: the key {key.value!a} is there twice",
                    why=f"the first stands in line {first[key.value][0]}; only one of them could count",
                )
            first[key.value] = places[(*path, key.value)] = _place(key)
            _walk(value, (*path, key.value), places, source, seen)


def _place(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1
