"""Files that are either the old one or the new one, also after a crash."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]


def write_atomic(path: PathLike, data: bytes) -> None:
    """Write a temporary neighbour, flush it to the disk, and rename it over `path`.

    Raises:
        OSError: that is impossible; names `path`, which is as before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with _errors_name(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: PathLike, value: Any) -> None:
    """Write standard JSON atomically; NaN and infinity are refused."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def require_free(out: PathLike, replace: bool = False) -> Path:
    """The path of a file to write; makes its folder.

    Raises:
        FileExistsError: it exists and may not be replaced.
    """
    path = Path(out)
    if path.exists() and not replace:
        raise FileExistsError(f"out={os.fspath(out)!r} exists; choose another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def require_writable(folder: PathLike) -> None:
    """Make a folder unless it exists.

    Raises:
        OSError: it cannot be made, or nothing can be written into it.
    """
    folder = Path(folder)
    probe = folder / f".probe.tmp-{os.getpid()}"
    with _errors_name(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"0")
        finally:
            probe.unlink(missing_ok=True)


def write_folder(path: PathLike, fill: Callable[[Path], None]) -> None:
    """Create the folder `path` with what `fill(folder)` writes into it, visible only once complete.

    Raises:
        OSError: `path` exists and is not empty, or cannot be written; names `path`.
    """
    path = Path(path).resolve()  # "." has no name
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with _errors_name(path):
        try:
            temporary.mkdir(parents=True)
            fill(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: PathLike) -> None:
    """Remove a folder, which is whole or gone at any time; `remove_temporaries` finishes what was killed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    os.replace(path, temporary)
    shutil.rmtree(temporary)


def remove_temporaries(folder: PathLike, name: str = "*") -> None:
    """Remove what `write_atomic` and `write_folder` left of `name` in `folder` when they were killed."""
    for path in Path(folder).glob(f".{name}.tmp-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make new names in the folder last."""
    if os.name == "posix":  # a folder cannot be opened for fsync elsewhere
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """A `with` block whose OSErrors name this path: not a temporary one, nor none as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
