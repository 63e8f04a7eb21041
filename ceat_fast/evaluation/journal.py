"""An append-only record of verdicts that survives a crash at any moment.

A journal is a folder with one file of JSON lines per process. Every line ends with the CRC-32 of what stands before it,
and every verdict carries the key of the evaluation and the attack settings it was made with, so that each line can be
trusted, or not, by itself. Lines reach the disk (fsync) before `append` returns; an append that fails is undone.

    {"header": {"weights": ..., "data": ..., "ceat_fast version": ...}, "crc32": ...}
    {"column": "PGD-20", "settings": {...}, "crc32": ...}
    {"key": ..., "attack": "PGD-20", "subject": "ensemble", "sample": 17, "correct": true, ..., "crc32": ...}
    {"key": ..., "attack": "PGD-20", "seconds": 1.25, "crc32": ...}
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ceat_fast.evaluation.fingerprint import differences, key_of
from ceat_fast.files import PathLike, sync_folder

Record = dict[str, Any]
_CRC = b',"crc32":"'
_TAIL = len(_CRC) + 8 + len(b'"}\n')


class JournalMismatchError(ValueError):
    """The journal in this folder belongs to another evaluation."""


class Journal:
    """The verdicts of one evaluation; use it in a `with` block.

    Args:
        folder: where its files lie; made if missing.
        identity: what the verdicts depend on beside the attacks, by name (`fingerprint.identity`).
        attacks: name -> settings of each attack. Later sessions may add attacks.
        part: which file to write, one per process; all of them are read.

    Raises:
        JournalMismatchError: the folder holds the verdicts of other weights, data, settings or versions; names them.
        OSError: the folder cannot be written, or another process writes this part.
    """

    def __init__(
        self, folder: PathLike, identity: Mapping[str, Any], attacks: Mapping[str, Mapping[str, Any]], part: int = 0
    ) -> None:
        self.folder = Path(folder)
        self.path = self.folder / f"part-{part}.jsonl"
        self.identity = dict(identity)
        self.attacks = {name: dict(settings) for name, settings in attacks.items()}
        self.keys = {name: key_of(identity, name, settings) for name, settings in self.attacks.items()}
        self.damage: list[str] = []
        self._file = -1

    def __enter__(self) -> Journal:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._cut_torn_line()
            self._introduce()
        except BlockingIOError as error:
            self._close()
            raise OSError(
                f"another process is writing {str(self.path)!r}; wait for it or use another folder"
            ) from error
        except BaseException:
            self._close()
            raise
        sync_folder(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def records(self) -> Iterator[Record]:
        """All intact verdicts and times about the attacks of this session; `damage` then lists the damaged lines.

        Raises:
            JournalMismatchError: a line belongs to another evaluation.
        """
        return (record for record in self._lines() if record.get("attack") in self.attacks)

    def append(self, attack: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records about an attack, all or none.

        Raises:
            OSError: they cannot be written; the journal is as before.
        """
        prefix = {"key": self.keys[attack], "attack": attack}
        self._write([prefix | dict(record) for record in records])

    def _introduce(self) -> None:
        """Write the header and the columns that no part has yet."""
        known = {record["column"] for record in self._lines() if "column" in record}
        lines: list[Record] = [] if self.path.stat().st_size else [{"header": self.identity}]
        lines += [
            {"column": name, "settings": settings} for name, settings in self.attacks.items() if name not in known
        ]
        if lines:
            self._write(lines)

    def _lines(self) -> Iterator[Record]:
        """Every intact line of every part that belongs to this evaluation."""
        self.damage = []
        for path in sorted(self.folder.glob("part-*.jsonl")):
            for number, record in _read(path):
                if record is None:
                    self.damage.append(f"{path.name} line {number} is damaged; what it held is computed again")
                else:
                    self._require_ours(path, number, record)
                    yield record

    def _require_ours(self, path: Path, number: int, record: Record) -> None:
        reasons: list[str] = []
        if "header" in record:
            reasons = differences(record["header"], self.identity)
        elif record.get("column") in self.attacks:
            name = record["column"]
            reasons = [f"{name} {sentence}" for sentence in differences(record["settings"], self.attacks[name])]
        elif record.get("attack") in self.attacks and record["key"] != self.keys[record["attack"]]:
            reasons = [f"the record of {record['attack']} in line {number}"]
        if reasons:
            raise JournalMismatchError(
                f"{str(path)!r} belongs to another evaluation ({'; '.join(reasons)}); continue that one, "
                "or choose another folder for this one"
            )

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        data = b"".join(_encode(record) for record in records)
        before = os.fstat(self._file).st_size
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except BaseException as error:
            os.ftruncate(self._file, before)
            if not isinstance(error, OSError):
                raise
            raise OSError(
                error.errno,
                f"the journal cannot be written ({error.strerror}); what it holds is intact: make room and run again",
                str(self.path),
            ) from error

    def _cut_torn_line(self) -> None:
        """Remove a last line that a crash cut off."""
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.ftruncate(self._file, end)

    def _close(self) -> None:
        os.close(self._file)
        self._file = -1


def _encode(record: Mapping[str, Any]) -> bytes:
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()[:-1]
    return body + _CRC + b"%08x" % zlib.crc32(body) + b'"}\n'


def _decode(line: bytes) -> Record | None:
    """The record of a line, or None if the line is not what was written."""
    body, tail = line[:-_TAIL], line[-_TAIL:]
    if tail != _CRC + b"%08x" % zlib.crc32(body) + b'"}\n':
        return None
    record: Record = json.loads(body + b"}")
    return record


def _read(path: Path) -> Iterator[tuple[int, Record | None]]:
    """(line number from 1, record or None where it is damaged); a last line without end is still being written."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield number, _decode(line)
