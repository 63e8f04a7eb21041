"""Functions of the user's, named as "package.module:function"."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any


def search_working_directory() -> None:
    """Let imports find modules in the working directory, after all other places."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def import_function(what: str, name: str) -> Callable[..., Any]:
    """The function of that name; importing it runs its module's code.

    Modules are looked for in sys.path and, last, in the working directory.

    Args:
        what: what it is for, for the error: "model", "data set".
        name: "package.module:function".

    Raises:
        ValueError: there is no such module or name in it, or it cannot be called.
    """
    module_name, _, attribute = name.partition(":")
    search_working_directory()
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, one of its own imports does not
        raise ValueError(f"{what} {name!r}: no module named {error.name!r} can be imported") from error
    except AttributeError as error:
        raise ValueError(f"{what} {name!r}: module {module_name!r} has no {attribute!r}") from error
    if not callable(function):
        raise ValueError(f"{what} {name!r}: {attribute!r} is not callable")
    return function


def call_function(what: str, name: str, *arguments: Any, **named: Any) -> Any:
    """Import the function as `import_function` does, and call it.

    Raises:
        ValueError: it is not there, or does not take these arguments.
    """
    function = import_function(what, name)
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError as error:
        taken = [*map(repr, arguments), *(f"{key}={value!r}" for key, value in named.items())]
        raise ValueError(f"{what} {name!r} must be a function that takes ({', '.join(taken)}): {error}") from error
    except ValueError:
        pass  # what is built in may have no signature
    return function(*arguments, **named)
