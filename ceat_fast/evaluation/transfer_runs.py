"""Transfer tests of what lies on the disk: a run, and other runs as surrogates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ceat_fast.attacks import PGD
from ceat_fast.choices import require_choice
from ceat_fast.data import Dataset, load_dataset
from ceat_fast.evaluation.runs import tell_if_fewer
from ceat_fast.evaluation.transfer import PROTOCOLS, black_box, step_size, surrogate_attacks, transferability
from ceat_fast.evaluation.transfer_result import BlackBoxResult, TransferMatrix
from ceat_fast.files import PathLike, require_writable

if TYPE_CHECKING:
    from ceat_fast.training import Run

MATRIX = "transfer.json"
BLACK_BOX = "black_box.json"


@dataclass
class TransferConfig:
    """How transfer is tested. The defaults are those of Yang et al. (DVERGE, 2020).

    Args:
        eps: Linf radius of all attacks.
        alpha: step size; eps / 5 if not given.
        steps: gradient steps of PGD between members.
        restarts: random starts of PGD between members; a target is misled where one of them misleads it.
        protocol: which samples count between members: "all_correct" (those that every member has right),
            "source_correct" (for each source, those that it has right) or "all".
        samples: use only the first so many of them.
        surrogate_steps: gradient steps of the attacks on surrogates.
        surrogate_restarts: random starts of PGD and momentum PGD on surrogates.
        images: test only on the first so many test images.
        seed: of the attacks' noise, keyed by the image.
        precision: what attacks search in: "fp32", "bf16", "fp16" or "auto"; verdicts are made in fp32.
        batch_size: images per pass.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:1".
    """

    eps: float | str = 0.03
    alpha: float | str | None = None
    steps: int = 50
    restarts: int = 5
    protocol: str = "all_correct"
    samples: int | None = 1000
    surrogate_steps: int = 100
    surrogate_restarts: int = 3
    images: int | None = None
    seed: int = 0
    precision: str = "fp32"
    batch_size: int = 500
    device: str = "auto"

    def __post_init__(self) -> None:
        require_choice("protocol", self.protocol, PROTOCOLS)
        for name in ("samples", "images", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.attack()
        self.surrogate_attacks()

    def attack(self) -> PGD:
        """The attack between members."""
        alpha = step_size(self.eps, self.alpha)
        return PGD(self.eps, alpha, self.steps, restarts=self.restarts, seed=self.seed, precision=self.precision)

    def surrogate_attacks(self) -> dict[str, Any]:
        """The attacks on surrogates."""
        return surrogate_attacks(
            self.eps,
            self.alpha,
            steps=self.surrogate_steps,
            restarts=self.surrogate_restarts,
            seed=self.seed,
            precision=self.precision,
        )


def transfer_run(
    run: Run,
    surrogates: Sequence[Run] = (),
    config: TransferConfig | None = None,
    *,
    out: PathLike | None = None,
    dataset: Dataset | None = None,
    show: Callable[[TransferMatrix | BlackBoxResult], object] | None = None,
    console: Console | None = None,
) -> tuple[TransferMatrix, BlackBoxResult | None]:
    """Test the last checkpoint of a run on its test images, and write transfer.json into its folder or `out`.

    Args:
        run: the run.
        surrogates: runs on the same data whose ensembles are attacked in its place, for black_box.json; without any
            there is no such result.
        config: how to test.
        out: another folder for the results, made if missing.
        dataset: use this data instead of loading the run's.
        show: is given each result before it is written.
        console: shows the progress.

    Raises:
        ValueError: a surrogate was trained on other data, or is the run itself; `out` is another run.
        OSError: the folder cannot be written; that is tried first.
    """
    from ceat_fast.evaluation.sources import require_no_run

    config = config or TransferConfig()
    folder = run.folder if out is None else Path(out)
    settings = run.config
    for other in surrogates:
        if other.folder.resolve() == run.folder.resolve():
            raise ValueError(f"{str(other.folder)!r} cannot be its own surrogate: that is no black box")
        if (name := other.config.data.name) != settings.data.name:
            raise ValueError(f"surrogate {str(other.folder)!r} is of {name}, the run of {settings.data.name}")
    require_no_run(folder, own=run.folder)
    require_writable(folder)
    dataset = dataset or load_dataset(settings.data.name, settings.data.root)
    tell_if_fewer(config.images, dataset, console)
    images = dataset.test_images[: config.images].float() / dataset.scale
    labels = dataset.test_labels[: config.images]
    ensemble = run.load_ensemble(dataset, config.device)
    about = {"name": settings.method.label, "model": str(run.folder), "dataset": dataset.name}
    common: dict[str, Any] = {"batch_size": config.batch_size, "console": console}
    matrix = transferability(
        ensemble,
        images,
        labels,
        config.attack(),
        protocol=config.protocol,
        samples=config.samples,
        about=about,
        **common,
    )
    if show is not None:
        show(matrix)
    matrix.save(folder / MATRIX)
    if not surrogates:
        return matrix, None
    models = {str(other.folder): other.load_ensemble(dataset, config.device) for other in surrogates}
    result = black_box(ensemble, models, images, labels, config.surrogate_attacks(), about=about, **common)
    if show is not None:
        show(result)
    result.save(folder / BLACK_BOX)
    return matrix, result
