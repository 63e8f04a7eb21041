"""Judging what lies on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from ceat_fast.data import Dataset
from ceat_fast.evaluation.protocol import EvaluationConfig, columns
from ceat_fast.evaluation.result import EvaluationResult
from ceat_fast.evaluation.session import evaluate
from ceat_fast.evaluation.shards import is_main_process
from ceat_fast.files import PathLike

if TYPE_CHECKING:
    from ceat_fast.evaluation.sources import Source
    from ceat_fast.training import AttackConfig, Run


def evaluate_run(
    run: Run,
    config: EvaluationConfig | None = None,
    *,
    attack: AttackConfig | None = None,
    out: PathLike | None = None,
    dataset: Dataset | None = None,
    console: Console | None = None,
) -> EvaluationResult:
    """Judge the last checkpoint of a run on its test images; continues where an earlier call was interrupted.

    Args:
        run: the run.
        config: what to judge by.
        attack: budget of the attacks; default: `evaluation` of the run's config.
        out: folder for journal and evaluation.json; default: the run's, with the journal in `evaluation/`.
        dataset: use this data instead of loading the run's.
        console: shows the progress.

    Raises:
        ValueError: as `evaluate`, or a run without checkpoint.
    """
    from ceat_fast.evaluation.sources import RunSource

    return evaluate_source(RunSource(run), config, attack=attack, out=out, dataset=dataset, console=console)[0]


def evaluate_source(
    source: Source,
    config: EvaluationConfig | None = None,
    *,
    attack: AttackConfig | None = None,
    out: PathLike | None = None,
    dataset: Dataset | None = None,
    console: Console | None = None,
) -> tuple[EvaluationResult, Path]:
    """The same for whatever `ceat-fast evaluate` takes; returns the result and the file that holds it."""
    from ceat_fast.training.distributed.layout import local_device

    config = config or EvaluationConfig()
    device = local_device(config.device)
    dataset = dataset or source.dataset()
    model = source.load(dataset)
    journal, path = source.places(model, out)
    with _without_tf32():
        result = evaluate(
            model.to(device),
            dataset.test_images.float() / dataset.scale,
            dataset.test_labels,
            columns(attack or source.attack, config),
            members=config.members,
            batch_size=config.batch_size,
            samples=config.images,
            journal=journal,
            keep_adversarials=config.keep_adversarials,
            sanity_samples=config.sanity_samples,
            about={**source.about, "dataset": dataset.name, "journal": str(journal)},
            console=console,
        )
    if is_main_process():
        result.save(path)
    return result, path


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Convolutions on a GPU in fp32, not rounded to TF32 as torch does unless told; searches and verdicts alike."""
    try:
        allowed = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set through the newer of torch's two interfaces, by somebody who knows what they want
        yield
        return
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
