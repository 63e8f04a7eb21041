"""The paper's tables and figures as lists of trainings, with the numbers that it reports for them.

Every method here has the settings of the paper's scale; `scales` says what becomes of them elsewhere. Where the paper
does not give a setting of a method, it is that of the method's own paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ceat_fast.methods import ADP, CEAT, DVERGE, EAT, FASTEN, GAL, LAFED, TRS, CalibratedDistance, Method, Standard
from ceat_fast.reproduce import numbers
from ceat_fast.reproduce.judgements import BLACK_BOX
from ceat_fast.reproduce.numbers import COLUMNS, Numbers

RESNET20 = ("resnet20",) * 3


@dataclass(frozen=True)
class Row:
    """One method of a table."""

    name: str
    method: Method
    paper: Mapping[str, float] = field(default_factory=dict)  # column -> the paper's accuracy in percent


@dataclass(frozen=True)
class Block:
    """A part of a table: one data set, one kind of ensemble."""

    title: str
    dataset: str
    models: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper.

    Attributes:
        name: for the command line.
        title: what it shows.
        columns: what is measured, by the paper's names.
        blocks: its parts.
        contrasts: pairs (a, b) of rows of one block whose difference a - b is what the paper argues with.
        axis: for a figure over a setting, its name; the rows are then its values.
        measure: "attacks", "transfer" between members, or "black box" attacks from surrogates.
        per_epoch: also judge held-out images after every epoch.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    blocks: tuple[Block, ...]
    contrasts: tuple[tuple[str, str], ...]
    axis: str | None = None
    measure: str = "attacks"
    per_epoch: bool = False


def _methods() -> dict[str, Method]:
    return {
        "ADP": ADP(),
        "GAL": GAL(),
        "TRS": TRS(),
        "DVERGE": DVERGE(),
        "LAFED": LAFED(),
        "FASTEN": FASTEN(),
    }


def _rows(methods: Mapping[str, Method], paper: Numbers) -> tuple[Row, ...]:
    return tuple(Row(name, method, _by_column(paper.get(name, ()))) for name, method in methods.items())


def _by_column(values: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(COLUMNS, values, strict=False))


def _table1() -> Experiment:
    methods = {"EAT": EAT()} | _methods() | {"CEAT(5,1)": CEAT(lam=5.0, mu=1.0), "CEAT(1,5)": CEAT(lam=1.0, mu=5.0)}
    # The paper gives its EAT baseline in Table 4 alone.
    cifar10 = {"EAT": numbers.TABLE_4["1: EAT"], **numbers.TABLE_1_CIFAR10}
    blocks = (
        Block("CIFAR-10", "cifar10", RESNET20, _rows(methods, cifar10)),
        Block("CIFAR-100", "cifar100", RESNET20, _rows(methods, numbers.TABLE_1_CIFAR100)),
    )
    contrasts = tuple(("CEAT(1,5)", name) for name in methods if name != "CEAT(1,5)")
    return Experiment("table1", "Comparison of the methods (Table 1)", COLUMNS, blocks, contrasts)


def _table2() -> Experiment:
    methods: dict[str, Method] = {}
    for name, method in _methods().items():
        methods[name] = method
        methods[f"{name} + L^D"] = type(method)(plus_ceat=CalibratedDistance(lam=1.0, mu=5.0))
    block = Block("CIFAR-10", "cifar10", RESNET20, _rows(methods, numbers.TABLE_2))
    contrasts = tuple((f"{name} + L^D", name) for name in _methods())
    return Experiment("table2", "The calibrated distance on other methods (Table 2)", COLUMNS, (block,), contrasts)


def _table3() -> Experiment:
    methods = _methods() | {"CEAT": CEAT(lam=1.0, mu=5.0)}
    depths = ("resnet20", "resnet26", "resnet32")
    blocks = (
        Block("three depths", "cifar10", depths, _rows(methods, numbers.TABLE_3_DEPTHS)),
        Block("four members", "cifar10", ("resnet20",) * 4, _rows(methods, numbers.TABLE_3_FOUR)),
    )
    contrasts = tuple(("CEAT", name) for name in _methods())
    return Experiment("table3", "Members of three depths, and four members (Table 3)", COLUMNS, blocks, contrasts)


def _table4() -> Experiment:
    methods: dict[str, Method] = {
        "1: EAT": EAT(),
        "2: L_adv": CEAT(lam=0.0, mu=5.0, mu_exponent=0.0),
        "3: e^D L_adv": CEAT(lam=0.0, mu=5.0),
        "4: L_adv, L_nat": CEAT(lam=1.0, mu=5.0, lam_exponent=0.0, mu_exponent=0.0),
        "5: e^D L_adv, e^D L_nat": CEAT(lam=1.0, mu=5.0),
    }
    names = list(methods)
    pairs = ((1, 0), (2, 1), (4, 3), (3, 0), (4, 0))
    block = Block("CIFAR-10", "cifar10", RESNET20, _rows(methods, numbers.TABLE_4))
    contrasts = tuple((names[a], names[b]) for a, b in pairs)
    return Experiment("table4", "The parts of the loss (Table 4)", COLUMNS, (block,), contrasts)


def _sweep(name: str, setting: str, values: tuple[float, ...], fixed: Mapping[str, Any]) -> Experiment:
    settings: dict[str, dict[str, Any]] = {f"{setting} = {value:g}": {setting: value, **fixed} for value in values}
    methods = {row: CEAT(**chosen) for row, chosen in settings.items()}
    block = Block("CIFAR-10", "cifar10", RESNET20, _rows(methods, {}))
    number = name.removeprefix("fig")
    title = f"Sensitivity to {setting} (Figure {number})"
    first, *rest = methods
    return Experiment(name, title, COLUMNS, (block,), tuple((row, first) for row in rest), axis=setting)


def _fig2() -> Experiment:
    """Eq. 17 without e^D, on the samples on which the peers agree, disagree, are all right (F3) or all wrong (F4)."""

    def distance(samples: str) -> EAT:
        return EAT(plus_ceat=CalibratedDistance(lam=0.0, mu=5.0, mu_exponent=0.0, samples=samples))

    methods: dict[str, Method] = {
        "EAT": EAT(),
        "L_adv, consistent": distance("consistent"),
        "L_adv, inconsistent": distance("inconsistent"),
        "L_adv, F3": distance("F3"),
        "L_adv, F4": distance("F4"),
        "L_adv, all": distance("all"),
    }
    block = Block("CIFAR-10", "cifar10", RESNET20, _rows(methods, {}))
    contrasts = tuple((name, "EAT") for name in methods if name != "EAT")
    title = "Distance on consistent and inconsistent samples (Figure 2)"
    return Experiment("fig2", title, ("NAT", "PGD20"), (block,), contrasts, per_epoch=True)


def _fig3() -> Experiment:
    methods = {"Baseline": Standard()} | _methods() | {"CEAT": CEAT(lam=1.0, mu=5.0)}
    columns = tuple(f"{source}>{target}" for source in (1, 2, 3) for target in (1, 2, 3))
    flat = {name: [rate for row in matrix for rate in row] for name, matrix in numbers.FIGURE_3.items()}
    rows = tuple(Row(name, method, dict(zip(columns, flat[name], strict=True))) for name, method in methods.items())
    block = Block("CIFAR-10", "cifar10", RESNET20, rows)
    contrasts = tuple(("CEAT", name) for name in methods if name != "CEAT")
    title = "Success rates of attacks on one member, shown to another (Figure 3; low is good)"
    return Experiment("fig3", title, columns, (block,), contrasts, measure="transfer")


def _fig6() -> Experiment:
    methods = {"EAT": EAT()} | _methods() | {"CEAT": CEAT(lam=1.0, mu=5.0)}
    block = Block("CIFAR-10", "cifar10", RESNET20, _rows(methods, {}))
    contrasts = tuple(("CEAT", name) for name in methods if name != "CEAT")
    title = "Black-box robustness and training time (Figure 6)"
    return Experiment("fig6", title, ("NAT", BLACK_BOX), (block,), contrasts, measure="black box")


EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        _table1(),
        _table2(),
        _table3(),
        _table4(),
        _fig2(),
        _fig3(),
        _sweep("fig4", "lam", (1.0, 2.0, 3.0, 4.0, 5.0), {"mu": 1.0}),
        _sweep("fig5", "mu", (2.0, 3.0, 4.0, 5.0, 6.0), {"lam": 1.0}),
        _fig6(),
    )
}
