"""The one way in which a wrong name is refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, value: object, allowed: Iterable[str]) -> str:
    """Error text for a name that is not among `allowed`; names the nearest one, then all of them."""
    names = list(allowed)
    nearest = difflib.get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"unknown {kind} {value!r}{hint}; allowed: {', '.join(map(repr, names))}"


def require_choice(kind: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    names = list(allowed)
    if value not in names:
        raise ValueError(unknown_name(kind, value, names))
