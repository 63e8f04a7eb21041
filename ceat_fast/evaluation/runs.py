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
    tell_if_fewer(config.images, dataset, console)
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
        _tell_what_goes(path, result, console)
        result.save(path)
    return result, path


def tell_if_fewer(images: int | None, dataset: Dataset, console: Console | None) -> None:
    """Say so where the data set has fewer test images than were asked for."""
    count = len(dataset.test_images)
    if console is not None and images is not None and images > count:
        console.print(f"images={images}: {dataset.name} has {count} test images", highlight=False, soft_wrap=True)


def _tell_what_goes(path: Path, result: EvaluationResult, console: Console | None) -> None:
    """Say so where the result is about to replace one with more images or columns."""
    try:
        earlier = EvaluationResult.load(path)
    except (OSError, ValueError):
        return
    columns = [name for name in earlier.attacks if name not in result.attacks]
    more = [f"{len(earlier.labels)} images"] if len(earlier.labels) > len(result.labels) else []
    more += [f"the columns {', '.join(columns)}"] if columns else []
    if console is not None and more:
        text = f"{path} had {' and '.join(more)}; it is replaced, its verdicts stay in {earlier.about.get('journal')}"
        console.print(text, highlight=False, soft_wrap=True)


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
