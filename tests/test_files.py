"""Files that are the old one or the new one, and errors that say which file they are about."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ceat_fast.files import require_writable, write_atomic, write_folder


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ceat_fast.files.os.fsync", fsync)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_reported_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*/a\.json'$"):
        write_atomic(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_text() == "old"
    with pytest.raises(OSError, match=r"No space left on device: '.*/folder'$"):
        write_folder(tmp_path / "folder", lambda folder: write_atomic(folder / "a", b""))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_is_replaced_and_not_written_over(tmp_path: Path) -> None:
    """Who reads the old one meanwhile reads all of it."""
    path, other = tmp_path / "file", tmp_path / "other name"
    path.write_bytes(b"old")
    os.link(path, other)
    write_atomic(path, b"new")
    assert (path.read_bytes(), other.read_bytes()) == (b"new", b"old")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for write in (
        lambda path: write_atomic(path, b""),
        lambda path: write_folder(path, lambda folder: None),
        require_writable,
    ):
        with pytest.raises(OSError, match=r"'.*/file/inner'$"):
            write(tmp_path / "file" / "inner")


def test_a_folder_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_folder_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_folder(".", lambda folder: (folder / "a").touch())
    assert os.listdir(tmp_path) == ["here"]
    assert os.listdir(tmp_path / "here") == ["a"]
