"""What an experiment of the paper becomes on a data set: networks, epochs, attack budgets, seeds.

Schedules keep their shape: SGD falls tenfold after 75 and 95 of 120 epochs, Adam (ADP, GAL, TRS) after 90 and 120 of
150. Radii that a method searches inputs with keep their ratio to the radius of the training attack, 0.031 in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ceat_fast.attacks import parse_budget
from ceat_fast.data import data_folder
from ceat_fast.evaluation import CLEAN, TransferConfig
from ceat_fast.methods import ADP, DVERGE, FASTEN, GAL, LAFED, TRS, Method
from ceat_fast.reproduce.judgements import Attacked
from ceat_fast.training import (
    AttackConfig,
    DataConfig,
    MultiStep,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)

PAPER_RADIUS = 0.031

_SHARED_ADAM = (ADP, GAL, TRS)
_RADII: dict[type[Method], tuple[str, ...]] = {
    DVERGE: ("eps", "alpha"),
    LAFED: ("eps", "alpha"),
    FASTEN: ("eps",),
    TRS: ("first_delta", "last_delta"),
}


@dataclass(frozen=True)
class Setting:
    """How large an experiment is made on a data set.

    Attributes:
        datasets: the paper's data set -> ours; blocks of others are left out.
        models: the paper's network -> ours.
        seeds: trainings per row of an experiment that `other_seeds` does not name.
        sgd, adam: the optimizers, and their number of epochs.
        attack: makes the training inputs.
        evaluation: budget of the attacks that judge.
        judgements: what tables are judged by; a column that none of them gives stays empty.
        transfer: how transfer between members and from surrogates is tested.
        held_out: training images that are judged after every epoch, where an experiment asks for that.
        batch_size: images per step.
        train_images: use only the first so many.
        stands_in: what the results are shown under where they are not of the paper's own data and networks.
        files: leave the whole setting out unless this lies in the data folder; otherwise what is missing is fetched.
        other_seeds: experiment -> trainings per row; 0 leaves the whole setting out of it.
    """

    datasets: Mapping[str, str]
    models: Mapping[str, str]
    seeds: int
    sgd: tuple[OptimizerConfig, int]
    adam: tuple[OptimizerConfig, int]
    attack: AttackConfig
    evaluation: AttackConfig
    judgements: tuple[Attacked, ...]
    transfer: TransferConfig
    held_out: int
    batch_size: int = 128
    train_images: int | None = None
    stands_in: str | None = None
    files: str | None = None
    other_seeds: Mapping[str, int] = field(default_factory=dict)

    def seeds_of(self, experiment: str) -> int:
        """Trainings per row of an experiment."""
        return self.other_seeds.get(experiment, self.seeds)

    def is_there(self, data_root: str | None) -> bool:
        """Whether the files that it needs lie in the data folder."""
        return self.files is None or (data_folder(data_root) / self.files).exists()

    def titled(self, title: str) -> str:
        """A title of the paper with what stands in for its data."""
        return title if self.stands_in is None else f"{title} ({self.stands_in})"

    def train_config(
        self, method: Method, dataset: str, models: tuple[str, ...], seed: int, hold_out: bool = False
    ) -> TrainConfig:
        """Settings of one training, but for the place, device and data folder.

        Args:
            method: with the settings of the paper's scale.
            dataset, models: the paper's names.
            seed: of the training.
            hold_out: hold `held_out` training images out and judge them after every epoch.
        """
        shared = isinstance(method, _SHARED_ADAM)
        optimizer, epochs = self.adam if shared else self.sgd
        shares = (90 / 150, 120 / 150) if shared else (75 / 120, 95 / 120)
        milestones = sorted({max(1, round(epochs * share)) for share in shares})
        return TrainConfig(
            method=self.scaled(method),
            models=[self.models[model] for model in models],
            data=DataConfig(self.datasets[dataset], train_images=self.train_images),
            attack=self.attack,
            evaluation=self.evaluation,
            optimizer=optimizer,
            schedule=MultiStep(milestones=milestones),
            validation=ValidationConfig(self.held_out if hold_out else 0, attack=self.evaluation),
            epochs=epochs,
            batch_size=self.batch_size,
            seed=seed,
        )

    def scaled(self, method: Method) -> Method:
        """The method with its search radii in the same ratio to the radius of the training attack."""
        factor = parse_budget("eps", self.attack.eps) / PAPER_RADIUS
        names = _RADII.get(type(method), ())
        return replace(method, **{name: factor * getattr(method, name) for name in names}) if names else method

    def judged_as(self, column: str) -> str:
        """The name under which a judgement gives a column."""
        steps = self.evaluation.steps
        names = {"NAT": CLEAN, "PGD20": f"PGD-{steps}", "MIM": f"MIM-{steps}", "CW": f"CW-{steps}"}
        return names.get(column, column)
