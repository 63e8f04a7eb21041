"""Short names of settings for tables and figures."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any


def settings_label(name: str, settings: Any, always: tuple[str, ...] = (), never: tuple[str, ...] = ()) -> str:
    """`name`, and in brackets the fields of a dataclass that are not the default or are named in `always`."""
    shown = [
        f"{f.name}={_plain(getattr(settings, f.name))}"
        for f in fields(settings)
        if f.name not in never and (f.name in always or getattr(settings, f.name) != _default(f))
    ]
    return name + (f"({', '.join(shown)})" if shown else "")


def _default(setting: Field[Any]) -> Any:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
