"""One HTML page that sets several evaluations against each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ceat_fast.evaluation import CLEAN
from ceat_fast.evaluation.fingerprint import differences
from ceat_fast.files import PathLike, require_free, write_atomic
from ceat_fast.reports import figures, page, sections
from ceat_fast.reports.evaluated import Evaluated, open_evaluated
from ceat_fast.reports.statistics import main_columns, paired_difference
from ceat_fast.training.config import config_to_dict


def write_comparison(folders: Sequence[PathLike], out: PathLike) -> Path:
    """Write one HTML page: accuracies side by side, differences to the first sample by sample, curves, classes, costs.

    Args:
        folders: at least two folders with an evaluation.json; the first is what the others are compared with.
        out: the HTML file, which must not exist.

    Raises:
        ValueError: fewer than two folders, the same one twice, one that is not evaluated yet, evaluations on other
            data, without a common attack, or with other settings under the same name.
        FileExistsError: `out` exists.
    """
    if len(folders) < 2:
        raise ValueError(f"folders must name at least two evaluations to compare, got {len(folders)}")
    for place, folder in enumerate(folders):
        if any(Path(folder).resolve() == Path(other).resolve() for other in folders[:place]):
            raise ValueError(f"folders must name different evaluations, got {str(folder)!r} twice")
    out = require_free(out)
    evaluated = open_evaluated(folders)
    columns = common_columns(evaluated)
    text = page.page(
        "Comparison: " + ", ".join(one.label for one in evaluated),
        page.paragraph(_subject(evaluated[0]), "soft"),
        _accuracies(evaluated, columns),
        _differences(evaluated, columns),
        sections.curves(evaluated),
        _classes(evaluated, columns[-1]),
        _members(evaluated, columns),
        sections.sanity(evaluated),
        sections.cost(evaluated),
        sections.training(evaluated),
        _settings(evaluated),
    )
    write_atomic(out, text.encode())
    return out


def common_columns(evaluated: Sequence[Evaluated]) -> list[str]:
    """The main columns that all have, in the order of the first.

    Raises:
        ValueError: other data, no common attack, or other settings under the same name.
    """
    first = evaluated[0]
    for other in evaluated[1:]:
        prints = [(one.result.about["fingerprint"]["data"], len(one.result.labels)) for one in (first, other)]
        if prints[0] != prints[1]:
            raise ValueError(
                f"{str(other.folder)!r} was judged on other images than {str(first.folder)!r}: a comparison needs "
                "the same data and number of images"
            )
    shared = [name for name in main_columns(first.result) if all(name in one.result.attacks for one in evaluated)]
    for name in shared:
        for other in evaluated[1:]:
            changed = differences(first.result.settings(name), other.result.settings(name))
            if changed:
                raise ValueError(f"{name} was made with other settings in {str(other.folder)!r}: {'; '.join(changed)}")
    if shared == [CLEAN]:
        raise ValueError(f"{', '.join(str(one.folder) for one in evaluated)} have no attack in common")
    return shared


def _subject(one: Evaluated) -> str:
    dataset = one.result.about.get("dataset", "the data")
    return f"{len(one.result.labels):,} test images of {dataset}."


def _accuracies(evaluated: Sequence[Evaluated], columns: Sequence[str]) -> str:
    values = torch.tensor([[_main(one, name).accuracy for name in columns] for one in evaluated])
    best = {(0, int(row), column + 1) for column in range(len(columns)) for row in _top(values[:, column])}
    rows: list[list[page.Cell]] = []
    for one in evaluated:
        rows.append([one.label, *(sections.accuracy_cell(_main(one, name)) for name in columns)])
    caption = "Accuracy of the ensembles in %, with its 95 % interval; the best of each column is bold"
    table = page.table(caption, ("method", *columns), [rows], text_columns=1, best=frozenset(best))
    return page.section("Accuracy", table)


def _differences(evaluated: Sequence[Evaluated], columns: Sequence[str]) -> str:
    first = evaluated[0]
    rows: list[list[page.Cell]] = []
    for one in evaluated[1:]:
        cells: list[page.Cell] = []
        for name in columns:
            d = paired_difference(_main(first, name), _main(one, name))
            cells.append((f"{100 * d.difference:+.1f}", f"+{d.gained} -{d.lost}, p {_p_value(d.p_value)}"))
        rows.append([one.label, *cells])
    text = (
        f"Below each difference, on how many images the method alone is right (+), and on how many {first.label} alone "
        "(-), and McNemar's exact two-sided p-value. It says whether chance could have split the images like that; it "
        "says nothing about other training seeds."
    )
    caption = f"Accuracy in points, compared with {first.label}"
    table = page.table(caption, ("method", *columns), [rows], text_columns=1)
    return page.section("Differences, image by image", table, page.paragraph(text, "soft"))


def _classes(evaluated: Sequence[Evaluated], column: str) -> str:
    matrices = [sections.class_accuracy_column(one.result, column) for one in evaluated]
    labels = sorted(matrices[0])
    values = torch.tensor([[matrix[label] for matrix in matrices] for label in labels])
    hardest = values.mean(1).argsort(stable=True)[: sections.MOST_CLASSES].sort().values
    names = [str(labels[row]) for row in hardest.tolist()]
    columns = _short([one.label for one in evaluated])
    picture = figures.heat_map(values[hardest], names, columns, "class", "method", good_is_high=True)
    caption = f"Accuracy in % by class under {column}."
    return page.section("Classes", page.figure(picture, "Heat map of accuracy by class and method.", caption))


def _members(evaluated: Sequence[Evaluated], columns: Sequence[str]) -> str:
    rows: list[list[page.Cell]] = []
    for one in evaluated:
        members = [who for who in one.result.subjects if who.startswith("member")]
        if members:
            cells: list[page.Cell] = []
            for name in columns:
                found = [100 * one.result.score(who, name).accuracy for who in members]
                cells.append((f"{sum(found) / len(found):.1f}", f"{min(found):.1f} to {max(found):.1f}"))
            rows.append([one.label, *cells])
    if not rows:
        return ""
    caption = "Accuracy of the members in %, each under attacks on itself: mean, lowest and highest"
    return page.section("Members", page.table(caption, ("method", *columns), [rows], text_columns=1))


def _settings(evaluated: Sequence[Evaluated]) -> str:
    trees = {one.label: _flatten(config_to_dict(one.run.config)) for one in evaluated if one.run is not None}
    if len(trees) < 2:
        return ""
    names = list(dict.fromkeys(name for tree in trees.values() for name in tree))
    values = {name: [str(tree.get(name, "-")) for tree in trees.values()] for name in names if name != "out"}
    rows: list[list[page.Cell]] = [[name, *found] for name, found in values.items() if len(set(found)) > 1]
    table = page.table("Settings of training that differ", ("setting", *trees), [rows], text_columns=1, kind="text")
    return page.section("Settings", table)


def _main(one: Evaluated, attack: str) -> Any:
    return one.result.score(one.result.main_subject, attack)


def _top(values: torch.Tensor) -> list[int]:
    return [row for row, value in enumerate(values.tolist()) if value == values.max().item()]


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _short(labels: Sequence[str]) -> list[str]:
    return [label if len(label) <= 24 else f"{label[:10]}…{label[-12:]}" for label in labels]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their short names on the command line: "method" for its class, "method.lam" for an argument of it."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "class_path":
            flat[prefix.removesuffix(".")] = value.rpartition(".")[2]
        elif isinstance(value, dict):
            flat |= _flatten(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
