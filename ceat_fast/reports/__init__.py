"""Reports: tables for the terminal, and one HTML page for one or several runs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ceat_fast.attacks import PGD
from ceat_fast.data import Dataset, load_dataset
from ceat_fast.evaluation import CLEAN, EvaluationResult
from ceat_fast.files import PathLike, write_atomic
from ceat_fast.reports import figures, page
from ceat_fast.reports.tables import percent, score_table
from ceat_fast.training.config import config_to_yaml
from ceat_fast.training.run import Run

__all__ = ["score_table", "write_report"]

EXAMPLES = 8


def write_report(
    runs: Sequence[PathLike],
    out: PathLike,
    *,
    device: str = "auto",
    dataset: Dataset | None = None,
    replace: bool = False,
) -> Path:
    """Write one HTML page about evaluated runs: accuracies, training curves, adversarial examples and settings.

    Args:
        runs: run folders, each with metrics and an evaluation.json.
        out: the HTML file.
        device: where to compute the adversarial examples.
        dataset: use this data for the examples instead of loading each run's.
        replace: overwrite `out` if it exists.

    Raises:
        ValueError: no runs, a folder that is no run, or a run that is not trained and evaluated yet.
        FileExistsError: `out` exists and `replace` is false.
    """
    out = Path(out)
    if out.exists() and not replace:
        raise FileExistsError(f"out={os.fspath(out)!r} exists; choose another file")
    opened = [Run.open(run) for run in runs]
    if not opened:
        raise ValueError("runs must name at least one run folder")
    for run in opened:
        if not run.metrics or not run.evaluation_path.is_file():
            raise ValueError(
                f"run {str(run.folder)!r} must be trained and evaluated first: ceat-fast evaluate {run.folder}"
            )
    named = dict(zip(_labels(opened), opened, strict=True))
    results = {label: EvaluationResult.load(run.evaluation_path) for label, run in named.items()}
    records = {label: run.metrics for label, run in named.items()}
    text = page.page(
        "Robustness of " + ", ".join(named),
        _accuracies(results),
        _training(records),
        *(_examples(label, run, dataset, device) for label, run in named.items()),
        _settings(named, results),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, text.encode())
    return out


def _labels(runs: Sequence[Run]) -> list[str]:
    labels = [run.config.method.label for run in runs]
    return [
        label if labels.count(label) == 1 else f"{label} in {run.folder}"
        for label, run in zip(labels, runs, strict=True)
    ]


def _accuracies(results: dict[str, EvaluationResult]) -> str:
    columns = list(dict.fromkeys(score.attack for result in results.values() for score in result.scores))
    groups = []
    for label, result in results.items():
        cells = {(s.subject, s.attack): percent(s.accuracy, *s.interval) for s in result.scores}
        groups.append([[label, who, *(cells.get((who, column), "-") for column in columns)] for who in result.subjects])
    sentences = []
    for name, attack in next(iter(results.values())).attacks.items():
        if name != CLEAN:
            sentences.append(
                f"{name}: Linf, eps {attack['eps']:g} ({attack['eps_255']:.3g}/255), step {attack['alpha']:g}, "
                f"{attack['steps']} steps, {attack['restarts']} start(s). The ensemble is judged on inputs against "
                "the ensemble, each member on inputs against itself."
            )
    table = page.table("Accuracy in % with its 95 % interval", ("method", "subject", *columns), groups, text_columns=2)
    return page.section("Accuracy", table, *map(page.paragraph, sentences))


def _training(records: dict[str, list[dict[str, Any]]]) -> str:
    names = ", ".join(records)
    parts = [
        page.figure(
            figures.training_curves(records),
            f"Line charts over the epochs for {names}: loss, adversarial cross-entropy, adversarial training accuracy.",
            "The losses of different methods have different terms; cross-entropy and accuracy can be compared.",
        ),
        page.figure(
            figures.disparity_maps(records),
            f"Heat maps for {names}: share of samples by disparity of the peers and epoch.",
            "How far apart the peers' true-class probabilities are. 0: they agree; 1: one is sure, one is wrong.",
        ),
    ]
    weights = figures.weight_curves(records)
    if weights is not None:
        caption = "The exponential weights of the calibrated distances, mean and largest of each epoch."
        parts.append(page.figure(weights, "Line charts over the epochs: clean and adversarial weights.", caption))
    return page.section("Training", *parts)


def _examples(label: str, run: Run, dataset: Dataset | None, device: str) -> str:
    config = run.config
    dataset = dataset or load_dataset(config.data.name, config.data.root)
    ensemble = run.load_ensemble(dataset, device)
    where = next(ensemble.parameters()).device
    images = dataset.test_images[: 25 * EXAMPLES].to(where).float() / dataset.scale
    labels = dataset.test_labels[: 25 * EXAMPLES].to(where)
    attack = PGD(**vars(config.evaluation), seed=0)
    adversarial = attack(ensemble, images, labels, index=torch.arange(len(images), device=where))
    with torch.no_grad():
        before, after = ensemble(images).argmax(-1), ensemble(adversarial).argmax(-1)
    fooled = ((before == labels) & (after != labels)).float()
    chosen = fooled.argsort(descending=True, stable=True)[:EXAMPLES].sort().values
    rows = (tensor[chosen].cpu() for tensor in (images, adversarial, labels, before, after))
    png = figures.adversarial_examples(figures.Examples(*rows), magnify=0.5 / attack.radius)
    share = f"{int(fooled.sum())} of the first {len(images)} test images"
    caption = (
        f"True class → prediction. The attack changes a correct prediction on {share}; such images are shown first."
    )
    return page.section(f"Adversarial examples: {label}", page.figure(png, _alt(label), caption))


def _alt(label: str) -> str:
    return f"{EXAMPLES} test images, their adversarial versions against {label}, and the magnified difference."


def _settings(runs: dict[str, Run], results: dict[str, EvaluationResult]) -> str:
    parts = []
    for label, run in runs.items():
        seconds = sum(record["seconds"] for record in run.metrics)
        parts.append(page.paragraph(f"{label}: {len(run.metrics)} epochs in {seconds:.0f} s of training."))
        parts.append(page.details(f"Settings of {label}", config_to_yaml(run.config)))
        environment = {
            "training": json.loads(run.environment_path.read_text()),
            "evaluation": results[label].environment,
        }
        parts.append(page.details(f"Versions and hardware of {label}", json.dumps(environment, indent=2)))
    return page.section("Settings", *parts)
