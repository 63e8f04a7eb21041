"""Refusals of settings in readable words, with the nearest name that exists."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields

# How jsonargparse says that it does not know a name.
_KIND = re.compile(r'(?P<key>\w+)"?: .*?dot import path string: (?P<name>[\w-]+)(?!\S)')
_KIND_SETTING = re.compile(
    r"""(?P<key>\w+)"?: .*?class_path '[\w.]*?(?P<kind>\w+)': Option '(?P<name>[^']+)' is not accepted"""
)
_GROUP = re.compile(r'(?P<key>[\w.]+)"?: Unable to load config')
_NAME = re.compile(
    r"(?:(?:Group '(?P<group>[\w.]+)' )?does not accept option '|Option '|unrecognized arguments: --|invalid choice: ')"
    r"(?P<name>[\w.-]+)"
)


def readable(message: str, names: Collection[str], kinds: Mapping[str, Sequence[type]]) -> str:
    """A refusal of jsonargparse on one line, with the nearest valid name or the names that are allowed in that place.

    Args:
        message: what jsonargparse says.
        names: what can be named, with dots.
        kinds: setting -> the classes that it can be.
    """
    message = re.sub(r'^Parser key "([\w.]+)":', r"\1:", " ".join(message.split()))
    if (found := _KIND.search(message)) and found["key"] in kinds:
        allowed = [kind.__name__ for kind in kinds[found["key"]]]
        folded = {name.lower(): name for name in allowed}
        near = difflib.get_close_matches(found["name"].lower(), folded, n=1)
        hint = f" (did you mean {folded[near[0]]!r}?)" if near else ""
        kind = found["key"]
        return f"unknown {kind} {found['name']!r}{hint}; allowed: {', '.join(allowed)}, or the import path of your own"
    if found := _KIND_SETTING.search(message):
        own = [kind for kind in kinds.get(found["key"], ()) if kind.__name__ == found["kind"]]
        settings = [f"{found['key']}.{field.name}" for kind in own for field in fields(kind)]
        return message + _hint(f"{found['key']}.{found['name']}", settings)
    if found := _GROUP.search(message):
        return message + _allowed(found["key"], names)
    if found := _NAME.search(message):
        place = f"{found['group']}." if found["group"] else ""
        return message + _hint(place + found["name"], names)
    return message


def _hint(name: str, names: Collection[str]) -> str:
    """The nearest of the names; the settings of that name elsewhere in the tree; or all in its place."""
    folded = {known.lower(): known for known in sorted(names)}
    written = name.lower().replace("-", "_")
    place, _, last = written.rpartition(".")
    elsewhere = [known for known in folded.values() if known.rpartition(".")[2] == last]
    others = [known for known in folded if not written.startswith(f"{known}.")]  # but what it would be a part of
    nearest = elsewhere or [folded[near] for near in difflib.get_close_matches(written, others, n=1, cutoff=0.75)]
    if nearest:
        return f"; did you mean {' or '.join(map(repr, nearest[:3]))}?"
    return _allowed(place, names)


def _allowed(place: str, names: Collection[str]) -> str:
    """The names in that place, or in the nearest one around it that has any."""
    beside = sorted(name for name in names if name.rpartition(".")[0] == place)
    if not beside and place:
        return _allowed(place.rpartition(".")[0], names)
    return f"; allowed: {', '.join(beside)}" if beside else ""
