"""The scales of a reproduction: smoke shows that all of it runs, small fits a CPU, paper is the full recipe."""

from __future__ import annotations

from dataclasses import dataclass

from ceat_fast.evaluation import TransferConfig
from ceat_fast.reproduce.judgements import Attacked
from ceat_fast.reproduce.setting import Setting
from ceat_fast.training import SGD, Adam, AttackConfig


@dataclass(frozen=True)
class Scale:
    """How large experiments are made, on which data.

    Attributes:
        name: for the command line.
        settings: one per data set that the experiments are run on.
    """

    name: str
    settings: tuple[Setting, ...]


_DIGITS_MODELS = {
    "resnet20": "digits_resnet",
    "resnet26": "ceat_fast.reproduce.models:digits_resnet_6",
    "resnet32": "ceat_fast.reproduce.models:digits_resnet_8",
}
_CIFAR_MODELS = {
    "resnet20": "ceat_fast.reproduce.models:cifar_resnet_4",
    "resnet26": "ceat_fast.reproduce.models:cifar_resnet_6",
    "resnet32": "ceat_fast.reproduce.models:cifar_resnet_8",
}
# Tables 2 and 3 have more to train and judge than the others, and must end within an hour on two CPU cores as well.
_FEWER_DIGITS = {"table2": 3, "table3": 2}
_NO_CIFAR10 = {"table2": 0, "table3": 0}
_DIGITS = {"cifar10": "digits", "cifar100": "digits"}

_SMOKE_DIGITS = Setting(
    datasets=_DIGITS,
    models=_DIGITS_MODELS,
    seeds=2,
    sgd=(SGD(lr=0.1, grad_clip=1.0), 6),
    adam=(Adam(lr=0.01), 6),
    attack=AttackConfig(eps=0.05, alpha=0.05, steps=1),
    evaluation=AttackConfig(eps=0.05, alpha=0.02, steps=5),
    judgements=(Attacked(("PGD", "MIM", "CW"), images=100),),
    transfer=TransferConfig(eps=0.05, steps=5, restarts=1, surrogate_steps=5, surrogate_restarts=1, images=100),
    held_out=64,
    batch_size=32,
    train_images=256,
    stands_in="digits",
)
_SMALL_DIGITS = Setting(
    datasets=_DIGITS,
    models=_DIGITS_MODELS,
    seeds=5,
    sgd=(SGD(lr=0.2, grad_clip=1.0), 16),
    adam=(Adam(lr=0.01), 20),
    attack=AttackConfig(eps=0.15, alpha=0.06, steps=5),
    evaluation=AttackConfig(eps=0.15, alpha=0.01875, steps=20),
    judgements=(Attacked(("PGD", "MIM", "CW")), Attacked(("AA",), images=100)),
    transfer=TransferConfig(eps=0.15, surrogate_steps=50),
    held_out=287,
    batch_size=64,
    stands_in="digits",
    other_seeds=_FEWER_DIGITS,
)
_SMALL_CIFAR10 = Setting(
    datasets={"cifar10": "cifar10"},
    models=_CIFAR_MODELS,
    seeds=1,
    sgd=(SGD(lr=0.2, grad_clip=1.0), 4),
    adam=(Adam(lr=0.003), 5),
    attack=AttackConfig(eps=0.031, alpha=0.0125, steps=3),
    evaluation=AttackConfig(eps=0.031, alpha=0.003875, steps=20),
    judgements=(Attacked(("PGD", "MIM", "CW"), images=500), Attacked(("AA",), images=50)),
    transfer=TransferConfig(eps=0.031, surrogate_steps=50, images=500),
    held_out=200,
    batch_size=32,
    train_images=2000,
    stands_in="2,000 images of CIFAR-10",
    files="cifar-10-batches-py",
    other_seeds=_NO_CIFAR10,
)
_PAPER = Setting(
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
)

SCALES: dict[str, Scale] = {
    scale.name: scale
    for scale in (
        Scale("smoke", (_SMOKE_DIGITS,)),
        Scale("small", (_SMALL_DIGITS, _SMALL_CIFAR10)),
        Scale("paper", (_PAPER,)),
    )
}
