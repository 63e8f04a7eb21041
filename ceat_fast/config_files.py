"""Config files: what YAML or jsonargparse would let pass, or refuse without saying where."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from ceat_fast.files import PathLike


class ConfigFileParser(ArgumentParser):
    """A parser that checks the files of its config option."""

    def parse_path(self, path: PathLike, *arguments: Any, **options: Any) -> Any:
        try:
            require_settings(path)
        except ValueError as error:
            raise ValueError(f"config file {os.fspath(path)!r}: {error}") from error
        return super().parse_path(path, *arguments, **options)


def require_settings(path: PathLike) -> None:
    """Raise ValueError unless a file is YAML with settings by name, each of them once."""
    try:
        tree = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"must be text in UTF-8: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"must be YAML: {error}") from error
    if not isinstance(tree, yaml.MappingNode):
        raise ValueError(f'must hold settings, "name: value", got {"nothing" if tree is None else "something else"}')
    for key in _keys_given_twice(tree, "", set()):
        raise ValueError(f"gives {key} twice; the first would be without effect")


def _keys_given_twice(node: yaml.Node, place: str, seen: set[int]) -> Iterator[str]:
    """Dotted names of the keys that a mapping in the tree holds twice."""
    if id(node) in seen:  # an alias, which may refer to what it is in
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _keys_given_twice(item, place, seen)
    elif isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value]
        for (key, value), name in zip(node.value, names, strict=True):
            if names.count(name) > 1 and isinstance(key, yaml.ScalarNode):
                yield f"{place}{name}"
            yield from _keys_given_twice(value, f"{place}{name}.", seen)
