"""What an experiment of the paper becomes at a scale: data, networks, epochs, attack budgets, seeds.

Schedules keep their shape: SGD falls tenfold after 75 and 95 of 120 epochs, Adam (ADP, GAL, TRS) after 90 and 120 of
150. Radii that a method searches inputs with keep their ratio to the radius of the training attack, 0.031 in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ceat_fast.attacks import parse_budget
from ceat_fast.evaluation import CLEAN, TransferConfig
from ceat_fast.methods import ADP, DVERGE, FASTEN, GAL, LAFED, TRS, Method
from ceat_fast.reproduce.judgements import Attacked
from ceat_fast.training import (
    SGD,
    Adam,
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
class Scale:
    """How large an experiment is made.

    Attributes:
        name: for the command line.
        datasets: the paper's data set -> ours.
        models: the paper's network -> ours.
        seeds: trainings per row.
        sgd, adam: the optimizers, and their number of epochs.
        attack: makes the training inputs.
        evaluation: budget of the attacks that judge.
        judgements: what tables are judged by; a column that none of them gives stays empty.
        transfer: how transfer between members and from surrogates is tested.
        held_out: training images that are judged after every epoch, where an experiment asks for that.
        batch_size: images per step.
        train_images: use only the first so many.
    """

    name: str
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


_DIGITS_MODELS = {
    "resnet20": "digits_resnet",
    "resnet26": "ceat_fast.reproduce.models:digits_resnet_6",
    "resnet32": "ceat_fast.reproduce.models:digits_resnet_8",
}
_DIGITS = {"cifar10": "digits", "cifar100": "digits"}
_DIGITS_ATTACK = AttackConfig(eps=0.15, alpha=0.06, steps=5)

SCALES: dict[str, Scale] = {
    scale.name: scale
    for scale in (
        Scale(
            name="smoke",
            datasets=_DIGITS,
            models=_DIGITS_MODELS,
            seeds=2,
            sgd=(SGD(lr=0.1, grad_clip=1.0), 3),
            adam=(Adam(lr=0.01), 3),
            attack=AttackConfig(eps=0.05, alpha=0.05, steps=1),
            evaluation=AttackConfig(eps=0.05, alpha=0.02, steps=5),
            judgements=(Attacked(("PGD", "MIM", "CW"), images=100),),
            transfer=TransferConfig(eps=0.05, steps=5, restarts=1, surrogate_steps=5, surrogate_restarts=1, images=100),
            held_out=64,
            batch_size=32,
            train_images=256,
        ),
        Scale(
            name="small",
            datasets=_DIGITS,
            models=_DIGITS_MODELS,
            seeds=5,
            sgd=(SGD(lr=0.2, grad_clip=1.0), 16),
            adam=(Adam(lr=0.01), 20),
            attack=_DIGITS_ATTACK,
            evaluation=AttackConfig(eps=0.15, alpha=0.01875, steps=20),
            judgements=(Attacked(("PGD", "MIM", "CW")), Attacked(("AA",), images=100)),
            transfer=TransferConfig(eps=0.15, surrogate_steps=50),
            held_out=287,
            batch_size=64,
        ),
        Scale(
            name="paper",
            datasets={"cifar10": "cifar10", "cifar100": "cifar100"},
            models={name: name for name in ("resnet20", "resnet26", "resnet32")},
            seeds=3,
            sgd=(SGD(lr=0.01), 120),
            adam=(Adam(lr=1e-3), 150),
            attack=AttackConfig(),
            evaluation=AttackConfig(steps=20),
            judgements=(Attacked(("PGD", "MIM", "CW")), Attacked(("AA",))),
            transfer=TransferConfig(),
            held_out=1000,
        ),
    )
}
