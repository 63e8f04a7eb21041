"""Verdicts as they come in, by attack and subject, from this process, an earlier one or another one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ceat_fast.evaluation.result import Score
from ceat_fast.evaluation.verdicts import Verdicts


@dataclass
class _Effort:
    """What an attack cost, summed over batches, subjects and processes, and its remarks on the model."""

    seconds: float = 0.0
    images: int = 0
    forwards: int = 0
    backwards: int = 0
    flags: set[str] = field(default_factory=set)

    def add(self, record: Mapping[str, Any]) -> None:
        self.seconds += record["seconds"]
        self.images += record["images"]
        self.forwards += record["forwards"]
        self.backwards += record["backwards"]
        self.flags |= set(record["flags"])


class VerdictTable:
    """Which samples are judged, and how.

    Args:
        attacks: names of the columns.
        subjects: names of the subjects.
        samples: N; verdicts about other samples are left aside.
    """

    def __init__(self, attacks: Sequence[str], subjects: Sequence[str], samples: int) -> None:
        keys = [(attack, subject) for attack in attacks for subject in subjects]
        self._samples = samples
        self._subjects = list(subjects)
        self._effort = {attack: _Effort() for attack in attacks}
        self._found_by: dict[tuple[str, str], dict[int, str]] = {key: {} for key in keys}
        # Lists: a tensor is slow to fill one number at a time.
        self._rows: dict[tuple[str, str], list[tuple[Any, ...] | None]] = {key: [None] * samples for key in keys}

    def read(self, record: Mapping[str, Any]) -> None:
        """Take in a record of the journal."""
        if "seconds" in record:
            self._effort[record["attack"]].add(record)
            return
        key, sample = (record["attack"], record["subject"]), record["sample"]
        if key in self._rows and sample < self._samples:
            self._rows[key][sample] = tuple(record[name] for name in Verdicts._fields)
            if "found_by" in record:
                self._found_by[key][sample] = record["found_by"]

    def missing(self, attack: str, subjects: Sequence[str], batch: range) -> list[tuple[int, int]]:
        """(subject's number, place in the batch) of what is not judged yet."""
        return [
            (number, sample - batch.start)
            for number, subject in enumerate(subjects)
            for sample in batch
            if self._rows[attack, subject][sample] is None
        ]

    def add(
        self,
        attack: str,
        subjects: Sequence[str],
        batch: range,
        verdicts: Verdicts,
        found_by: Sequence[Sequence[str | None]],
        places: Sequence[tuple[int, int]],
    ) -> list[dict[str, Any]]:
        """Take in what was found at these places of a batch; returns it as records for the journal."""
        columns = {name: values.tolist() for name, values in verdicts._asdict().items()}
        records = []
        for row, place in places:
            record = {"attack": attack, "subject": subjects[row], "sample": batch.start + place}
            record |= {name: values[row][place] for name, values in columns.items()}
            if found_by and found_by[row][place] is not None:
                record["found_by"] = found_by[row][place]
            self.read(record)
            records.append(record)
        return records

    def margins(self, attack: str, subject: str, batch: range) -> dict[int, float]:
        """Sample of the batch -> the subject's margin, of those that are judged."""
        rows = self._rows[attack, subject]
        place = Verdicts._fields.index("margin")
        return {sample: row[place] for sample in batch if (row := rows[sample]) is not None}

    def correct(self, attack: str, subject: str, batch: range) -> int:
        """How many samples of the batch the subject has right."""
        return sum(row is not None and row[0] for row in self._rows[attack, subject][batch.start : batch.stop])

    def effort(self, attack: str, nominal_passes: tuple[float, float] | None) -> dict[str, Any]:
        """Seconds, passes per image and subject, the attack's remarks, and how many samples each part of it found."""
        effort = self._effort[attack]
        passes = nominal_passes
        if effort.forwards:
            passes = (effort.forwards / effort.images, effort.backwards / effort.images)
        found_by = {subject: dict(Counter(self._found_by[attack, subject].values())) for subject in self._subjects}
        return {
            "seconds": effort.seconds,
            "passes": None if passes is None else list(passes),
            "flags": sorted(effort.flags),
            "found_by": {subject: counts for subject, counts in found_by.items() if counts},
        }

    def scores(self) -> Iterator[Score]:
        """One score per column and subject.

        Raises:
            RuntimeError: a sample is not judged.
        """
        dtypes = (torch.bool, torch.int64, torch.float32, torch.float32)
        for (attack, subject), rows in self._rows.items():
            judged = [row for row in rows if row is not None]
            if len(judged) < len(rows):
                raise RuntimeError(f"{len(rows) - len(judged)} verdicts of {subject} under {attack} are missing")
            columns = zip(*judged, strict=True)
            yield Score(subject, attack, *(torch.tensor(c, dtype=d) for c, d in zip(columns, dtypes, strict=True)))
