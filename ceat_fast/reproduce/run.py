"""Run an experiment: train and judge what is missing, set it beside the paper, write table, figure and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ceat_fast.choices import require_choice
from ceat_fast.environment import describe_environment
from ceat_fast.files import PathLike, write_atomic, write_json
from ceat_fast.methods import Method, Standard
from ceat_fast.reproduce.cells import Cell, make_cell, run_cells
from ceat_fast.reproduce.experiments import EXPERIMENTS, Block, Experiment, Row
from ceat_fast.reproduce.figures import draw
from ceat_fast.reproduce.judgements import Attacked, BlackBox, Judgement, Transferred
from ceat_fast.reproduce.outcome import BlockResult, Reproduction, row_result
from ceat_fast.reproduce.scales import SCALES, Scale
from ceat_fast.reproduce.setting import Setting
from ceat_fast.reproduce.tables import grids, sentences

_SURROGATE_SEED = 1000  # above all seeds of rows: a surrogate is never one of the judged


def reproduce(
    name: str,
    scale: str = "smoke",
    *,
    out: PathLike = "runs/reproduce",
    seeds: int | None = None,
    only: Sequence[str] = (),
    jobs: int = 1,
    device: str = "auto",
    data_root: str | None = None,
    console: Console | None = None,
) -> Reproduction:
    """Reproduce a table or figure of the paper; continues where an earlier call was interrupted.

    Writes OUT/SCALE/NAME.md, .png and .json; the trainings lie in OUT/SCALE/runs and are shared between experiments.

    Args:
        name: a key of `EXPERIMENTS`, for example "table1".
        scale: a key of `SCALES`: "smoke", "small" or "paper".
        out: the folder for everything.
        seeds: trainings per row, on all data sets of the scale; default: what the scale has for the experiment and each
            data set, which can be none.
        only: names of rows to train and show; all by default.
        jobs: trainings at a time, each in a process of its own.
        device: where to compute.
        data_root: folder of the data sets; what a scale can do without is left out where it is not there.
        console: shows the progress.

    Raises:
        ValueError: an unknown experiment, scale or row, or a number below 1.
    """
    require_choice("experiment", name, EXPERIMENTS)
    require_choice("scale", scale, SCALES)
    experiment, size = EXPERIMENTS[name], SCALES[scale]
    for row in only:
        require_choice(f"row of {name}", row, {row.name for block in experiment.blocks for row in block.rows})
    if seeds is not None and not 1 <= seeds <= _SURROGATE_SEED:
        raise ValueError(f"seeds must be at least 1 and at most {_SURROGATE_SEED}, got {seeds}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    session = _Session(experiment, size, Path(out) / scale, device, data_root, jobs, console or Console(quiet=True))
    result = session.run(list(only), seeds)
    write(result, session.root)
    return result


def write(result: Reproduction, folder: Path) -> None:
    """Write table, figure and numbers of a reproduction into `folder`."""
    name = result.experiment.name
    parts = [f"# {result.experiment.title}, scale {result.scale.name}", *(grid.markdown() for grid in grids(result))]
    parts += ["\n".join(f"* {sentence}" for sentence in sentences(result)), f"![{result.experiment.title}]({name}.png)"]
    write_atomic(folder / f"{name}.md", ("\n\n".join(part for part in parts if part) + "\n").encode())
    write_atomic(folder / f"{name}.png", draw(result).png)
    write_json(folder / f"{name}.json", {**result.to_dict(), "environment": describe_environment()})


@dataclass(frozen=True)
class _Part:
    """The trainings of one block in one setting."""

    setting: Setting
    block: Block
    rows: dict[str, Row]
    cells: dict[str, list[Cell]]  # row -> one per seed

    def by_seed(self) -> list[Cell]:
        """All rows of the first seed first: an interrupted experiment then has something to compare."""
        return [cell for cells in zip(*self.cells.values(), strict=True) for cell in cells]


@dataclass
class _Session:
    """One call of `reproduce`."""

    experiment: Experiment
    scale: Scale
    root: Path
    device: str
    data_root: str | None
    jobs: int
    console: Console

    def run(self, only: list[str], seeds: int | None) -> Reproduction:
        reasons = [(setting, self._reason_against(setting, seeds)) for setting in self.scale.settings]
        parts = [part for setting, reason in reasons if not reason for part in self._parts(setting, only, seeds)]
        unique = {cell.folder: cell for part in parts for cell in part.by_seed()}
        found = dict(zip(unique, run_cells(list(unique.values()), self.jobs, self.console), strict=True))
        blocks = []
        for part in parts:
            lines = []
            for row, cells in part.cells.items():
                outcomes = [(cell.config.seed, found[cell.folder]) for cell in cells]
                lines.append(row_result(part.rows[row], outcomes, part.setting, self.experiment.columns))
            blocks.append(BlockResult(part.block, part.setting, lines))
        left_out = [(setting, reason) for setting, reason in reasons if reason]
        return Reproduction(self.experiment, self.scale, blocks, left_out)

    def _reason_against(self, setting: Setting, seeds: int | None) -> str:
        """Why a setting is left out; "" if it is not."""
        if seeds is None and setting.seeds_of(self.experiment.name) == 0:
            return f"{self.experiment.name} would take too long at scale {self.scale.name} (--seeds 1 includes it)"
        if not setting.is_there(self.data_root):
            return f"there is no {setting.files} in the data folder (--data_root)"
        return ""

    def _parts(self, setting: Setting, only: list[str], seeds: int | None) -> list[_Part]:
        parts = []
        for block in _distinct(self.experiment, setting):
            rows = {row.name: row for row in block.rows if not only or row.name in only}
            judgements = self._judgements(setting, block)
            cells = {
                name: [
                    self._cell(name, row.method, setting, block, seed, judgements)
                    for seed in range(setting.seeds_of(self.experiment.name) if seeds is None else seeds)
                ]
                for name, row in rows.items()
            }
            parts.append(_Part(setting, block, rows, cells))
        return parts

    def _judgements(self, setting: Setting, block: Block) -> tuple[Judgement, ...]:
        if self.experiment.measure == "transfer":
            return (Transferred(setting.transfer),)
        if self.experiment.measure == "black box":
            surrogate = self._cell("surrogate", Standard(), setting, block, _SURROGATE_SEED, ())
            run_cells([surrogate], 1, self.console)
            return (Attacked((), setting.transfer.images), BlackBox((surrogate.folder,), setting.transfer))
        return setting.judgements

    def _cell(
        self, name: str, method: Method, setting: Setting, block: Block, seed: int, judgements: tuple[Judgement, ...]
    ) -> Cell:
        config = setting.train_config(method, block.dataset, block.models, seed, self.experiment.per_epoch)
        name = f"{setting.titled(block.title)}, {name}"
        return make_cell(name, config, judgements, self.root, self.device, self.data_root)


def _distinct(experiment: Experiment, setting: Setting) -> list[Block]:
    """The blocks whose data the setting has, without those that would be another one's trainings in it."""
    blocks: dict[tuple[str, tuple[str, ...]], Block] = {}
    for block in experiment.blocks:
        if block.dataset in setting.datasets:
            models = tuple(setting.models[model] for model in block.models)
            blocks.setdefault((setting.datasets[block.dataset], models), block)
    return list(blocks.values())
