"""The parts of the pages about evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ceat_fast.evaluation import CLEAN, EvaluationResult, Score
from ceat_fast.evaluation.result import NOT_RUN, OK
from ceat_fast.reports import figures, page, training_figures
from ceat_fast.reports.canvas import Picture
from ceat_fast.reports.evaluated import Evaluated
from ceat_fast.reports.statistics import WORST, class_accuracies, main_columns, strongest, worst_case
from ceat_fast.reports.tables import plural
from ceat_fast.training.config import config_to_yaml

MOST_CLASSES = 20  # that a heat map shows; of more, those with the lowest accuracy
_NOT_SETTINGS = ("attack", "eps", "eps_as_given", "eps_255", "alpha", "alpha_as_given", "seed")


def summary(evaluated: Sequence[Evaluated]) -> str:
    """The main numbers as tiles, and what they are about."""
    parts = []
    for one in evaluated:
        result = one.result
        tiles = {name: accuracy_cell(result.score(result.main_subject, name)) for name in main_columns(result)}
        ran = sum(check.outcome != NOT_RUN for check in result.checks)
        tiles["sanity"] = (plural(len(result.flags), "flag"), f"{plural(ran, 'check')} ran")
        dataset = result.about.get("dataset", "the data")
        text = f"{result.main_subject}, {len(result.labels):,} test images of {dataset}. Accuracy in %."
        parts.append((page.subsection(one.label) if len(evaluated) > 1 else "") + page.paragraph(text, "soft"))
        parts.append(page.tiles(tiles))
    return "\n".join(parts)


def accuracies(evaluated: Sequence[Evaluated]) -> str:
    """The table of all subjects, and what the attacks were."""
    columns = list(dict.fromkeys(name for one in evaluated for name in main_columns(one.result)))
    rows = [_accuracy_rows(one, columns) for one in evaluated]
    shown = [*columns, WORST] if any(row[-1] != "-" for group in rows for row in group) else columns
    groups = [[row[: 1 + len(shown)] for row in group] for group in rows]
    caption = "Accuracy in %, with its 95 % interval (Wilson)"
    table = labelled_table(caption, ("subject", *shown), evaluated, groups, text_columns=1)
    note = (
        "The ensemble is judged on inputs made against the ensemble, each member on inputs made against itself. "
        "Accuracies under attack are upper bounds: a stronger attack may leave less."
    )
    return page.section("Accuracy", table, page.paragraph(note), _attacks(evaluated))


def labelled_table(
    caption: str,
    header: Sequence[str],
    evaluated: Sequence[Evaluated],
    groups: Sequence[Sequence[Sequence[page.Cell]]],
    text_columns: int,
) -> str:
    """A table with one group of rows per evaluation, headed by its label where there are several."""
    labels = [one.label for one in evaluated] if len(evaluated) > 1 else []
    return page.table(caption, header, groups, text_columns, labels=labels)


def sanity(evaluated: Sequence[Evaluated]) -> str:
    """Flags in full, the rest folded."""
    parts = []
    for one in evaluated:
        checks = one.result.checks
        if len(evaluated) > 1:
            parts.append(page.subsection(one.label))
        parts += [page.box("flag", f"{check.name}: {check.finding}", check.advice) for check in one.result.flags]
        passed = [check for check in checks if check.outcome == OK]
        if not one.result.flags and passed:
            parts.append(page.box("ok", f"None of {len(passed)} checks found a reason to doubt these numbers."))
        if not passed and not one.result.flags:
            parts.append(page.paragraph("No check ran."))
        lines = [f"ok       {check.name}: {check.finding}" for check in passed]
        lines += [f"not run  {check.name}: {check.finding}" for check in checks if check.outcome == NOT_RUN]
        parts.append(
            page.details(f"{len(passed)} checks passed, {len(lines) - len(passed)} did not run", "\n".join(lines))
        )
    return page.section("Sanity checks", *parts)


def curves(evaluated: Sequence[Evaluated]) -> str:
    """Accuracy over eps and over steps; empty without sweeps."""
    pictures = curve_pictures(evaluated)
    if not pictures:
        return ""
    drawn = [page.figure(picture, f"Line chart: accuracy over {name}.") for name, picture in pictures.items()]
    note = (
        "Accuracy under PGD, shaded with the 95 % interval. It should fall to 0 as eps grows, and level off over steps."
    )
    return page.section("Stronger attacks", page.row(*drawn), page.paragraph(note, "soft"))


def curve_pictures(evaluated: Sequence[Evaluated]) -> dict[str, Picture]:
    """ "eps" and "steps" -> chart, where there are sweeps."""
    results = {one.label: one.result for one in evaluated}
    found = {over: figures.accuracy_curves(results, over) for over in ("eps", "steps")}
    return {over: picture for over, picture in found.items() if picture is not None}


def transfer(one: Evaluated) -> str:
    """The transfer heat map and the black-box table; empty if neither was tested."""
    parts = []
    if one.transfer is not None:
        matrix = one.transfer
        text = (
            "How often inputs made against a member mislead the others and the ensemble: PGD, "
            f"eps {matrix.attack['eps']:g}, {matrix.attack['steps']} steps, "
            f"{plural(matrix.attack['restarts'], 'start')}, {len(matrix.samples):,} images "
            f"(protocol {matrix.protocol}). Mean between members: {100 * matrix.mean_transfer:.1f} %."
        )
        parts.append(page.figure(transfer_picture(one), "Heat map: success rate by source and target in %.", text))
    if one.black_box is not None:
        columns = {subject: one.black_box.accuracies(subject) for subject in one.black_box.subjects}
        names = list(next(iter(columns.values())))
        rows = [[name, *(f"{100 * column[name]:.1f}" for column in columns.values())] for name in names]
        caption = "Accuracy in % on inputs made against surrogates; the last row counts what withstands all of them"
        parts.append(page.table(caption, ("surrogate / attack", *columns), [rows], text_columns=1))
    return page.section(f"Transfer: {one.label}", *parts) if parts else ""


def transfer_picture(one: Evaluated) -> Picture:
    """Heat map of the success rates in percent."""
    matrix = one.transfer
    assert matrix is not None
    rates = 100 * matrix.rates
    return figures.heat_map(rates, matrix.sources, matrix.targets, "made against", "shown to", good_is_high=False)


def classes(one: Evaluated) -> str:
    """Accuracy by class of the main subject under every main column."""
    labels, values, columns = class_matrix(one.result)
    order = values[:, -1].argsort(stable=True)[:MOST_CLASSES].sort().values
    shown = (
        f"the {MOST_CLASSES} classes of {len(labels)} with the lowest accuracy" if len(labels) > len(order) else "all"
    )
    picture = class_picture(one.result, order)
    worst = int(values[:, -1].argmin())
    text = (
        f"Accuracy in % by class ({shown}). Under {columns[-1]} class {labels[worst]} is the weakest with "
        f"{values[worst, -1]:.1f} %, class {labels[int(values[:, -1].argmax())]} the strongest with "
        f"{values[:, -1].max():.1f} %."
    )
    return page.section(
        f"Classes: {one.label}",
        page.figure(picture, f"Heat map of accuracy by class and attack, {shown} classes.", text),
    )


def class_matrix(result: EvaluationResult) -> tuple[list[int], Tensor, list[str]]:
    """(classes, accuracies in percent (classes, columns), columns), the strongest attack last."""
    last = strongest(result)
    columns = [name for name in main_columns(result) if name != last] + ([last] if last else [])
    shares = [class_accuracy_column(result, name) for name in columns]
    labels = sorted(shares[0])
    return labels, torch.tensor([[share[label] for share in shares] for label in labels]), columns


def class_accuracy_column(result: EvaluationResult, attack: str) -> dict[int, float]:
    """Class -> accuracy of the main subject in percent under an attack."""
    shares = class_accuracies(result.score(result.main_subject, attack), result.labels)
    return {label: 100 * right / samples for label, (right, samples) in shares.items()}


def class_picture(result: EvaluationResult, order: Tensor | None = None) -> Picture:
    """Heat map of `class_matrix`, or of some of its rows."""
    labels, values, columns = class_matrix(result)
    rows = torch.arange(len(labels)) if order is None else order
    names = [str(labels[row]) for row in rows.tolist()]
    return figures.heat_map(values[rows], names, columns, "class", "attack", good_is_high=True)


def examples(one: Evaluated) -> str:
    """The hardest samples with their perturbation."""
    found = one.result.examples
    if found is None:
        return ""
    cards = []
    for number in range(len(found.labels)):
        clean, adversarial = found.clean[number], found.adversarial[number]
        label, before = int(found.labels[number]), int(found.clean_predictions[number])
        after = int(found.adversarial_predictions[number])
        difference = figures.perturbation(clean, adversarial, found.eps)
        pictures = {"clean": clean, "under attack": adversarial, "difference": difference}
        caption = f"image {int(found.samples[number])}: class {label}, clean → {before},"
        images = {name: figures.image_png(image) for name, image in pictures.items()}
        cards.append(page.example(images, caption, f"attacked → {after}"))
    text = (
        f"Clean, under {found.attack}, and the difference (grey: none, black and white: eps {found.eps:g}), of the "
        "images that are right when clean and have the lowest margin under attack."
    )
    return page.section(f"Hardest images: {one.label}", page.paragraph(text), page.row(*cards))


def cost(evaluated: Sequence[Evaluated]) -> str:
    """Seconds, images/s and passes per attack; which part of AutoAttack found what."""
    groups, parts = [], []
    for one in evaluated:
        result = one.result
        rows = []
        for name, facts in result.attacks.items():
            judged = len(result.labels) * len(result.subjects)
            passes = ["-" if count is None else f"{count:,.0f}" for count in facts["passes"] or (None, None)]
            speed = judged / max(facts["seconds"], 1e-9)
            rows.append([name, f"{facts['seconds']:,.1f}", f"{speed:,.0f}" if speed > 10 else f"{speed:.2g}", *passes])
            if facts["settings"].get("attack") == "AutoAttack":
                parts += _stages(one.label, name, facts["found_by"])
        groups.append(rows)
    header = ("attack", "seconds", "images/s", "forward", "backward")
    caption = "Computing time of all subjects together, images judged per second, and passes per image and subject"
    return page.section("Time and passes", labelled_table(caption, header, evaluated, groups, 1), *parts)


def training(evaluated: Sequence[Evaluated]) -> str:
    """Curves over the epochs, for runs that recorded any; empty without."""
    records = {one.label: one.run.metrics for one in evaluated if one.run is not None and one.run.metrics}
    if not records:
        return ""
    names = ", ".join(records)
    parts = [_pictures(training_figures.training_curves(records), f"Line chart over the epochs for {names}")]
    note = "The losses of different methods have different terms; cross-entropy and accuracy can be compared."
    parts.append(page.paragraph(note, "soft"))
    if maps := training_figures.disparity_maps(records):
        note = "How far apart the peers' true-class probabilities are. 0: they agree; 1: one is sure, one is wrong."
        parts += [page.subsection("Disparity of the peers"), _pictures(maps, "Heat map"), page.paragraph(note, "soft")]
    if weights := training_figures.weight_curves(records):
        note = "The exponential weights of the calibrated distances, mean and largest of each epoch."
        parts += [page.subsection("Weights"), _pictures(weights, "Line chart"), page.paragraph(note, "soft")]
    return page.section("Training", *parts)


def settings(evaluated: Sequence[Evaluated]) -> str:
    """Everything that the numbers depend on, folded."""
    parts = []
    for one in evaluated:
        about = {"about": one.result.about, "attacks": {n: one.result.settings(n) for n in one.result.attacks}}
        parts.append(page.details(f"Evaluation of {one.label}", json.dumps(about, indent=2)))
        environment = {"evaluation": one.result.environment}
        if one.run is not None:
            metrics = one.run.metrics
            seconds = sum(record.get("seconds", 0) for record in metrics)
            parts.append(page.paragraph(f"{one.label}: {len(metrics)} epochs in {seconds:,.0f} s of training."))
            parts.append(page.details(f"Settings of {one.label}", config_to_yaml(one.run.config)))
            if one.run.environment_path.is_file():
                environment["training"] = json.loads(one.run.environment_path.read_text())
        parts.append(page.details(f"Versions and hardware of {one.label}", json.dumps(environment, indent=2)))
    return page.section("Settings", *parts)


def _stages(label: str, attack: str, found_by: Mapping[str, Mapping[str, int]]) -> list[str]:
    if not found_by:
        return []
    found = dict.fromkeys(name for counts in found_by.values() for name in counts)
    names = sorted(found, key=lambda name: name != CLEAN)
    rows = [[who, *(str(counts.get(name, 0)) for name in names)] for who, counts in found_by.items()]
    caption = f"{label}, {attack}: how many images each part was the first to mislead"
    return [page.table(caption, ("subject", *names), [rows], text_columns=1)]


def _accuracy_rows(one: Evaluated, columns: Sequence[str]) -> list[list[page.Cell]]:
    """A row per subject: its name, the columns, and the worst case."""
    scores = {(score.subject, score.attack): score for score in one.result.scores}
    rows: list[list[page.Cell]] = []
    for who in one.result.subjects:
        found = [*(scores.get((who, name)) for name in columns), worst_case(one.result, who)]
        rows.append([who, *("-" if score is None else accuracy_cell(score) for score in found)])
    return rows


def _attacks(evaluated: Sequence[Evaluated]) -> str:
    """What the columns stand for."""
    rows: dict[str, list[page.Cell]] = {}
    for one in evaluated:
        for name in main_columns(one.result):
            settings = one.result.settings(name)
            if settings:
                others = {k: v for k, v in settings.items() if k not in _NOT_SETTINGS and v not in (None, (), [], {})}
                text = f"{settings['attack']}: " + ", ".join(f"{key} {value}" for key, value in others.items())
                rows.setdefault(name, [name, text, _budget(settings, "eps"), _budget(settings, "alpha")])
    if not rows:
        return ""
    return page.table("What the columns stand for", ("column", "attack", "eps", "step"), [list(rows.values())], 2)


def _budget(settings: Mapping[str, Any], name: str) -> page.Cell:
    """As given, and in units of 1/255."""
    value = settings.get(name)
    return "-" if value is None else (settings[f"{name}_as_given"], f"{value * 255:.4g}/255")


def accuracy_cell(score: Score) -> tuple[str, str]:
    """Accuracy in percent, with its interval below."""
    low, high = score.interval
    return f"{100 * score.accuracy:.1f}", f"{100 * low:.1f}-{100 * high:.1f}"


def _pictures(pictures: dict[str, Picture], alt: str) -> str:
    return page.row(*(page.figure(picture, f"{alt}: {title}.") for title, picture in pictures.items()))
