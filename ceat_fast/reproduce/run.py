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
from ceat_fast.reproduce.experiments import EXPERIMENTS, Block, Experiment
from ceat_fast.reproduce.figures import draw
from ceat_fast.reproduce.judgements import Attacked, BlackBox, Judgement, Transferred
from ceat_fast.reproduce.outcome import BlockResult, Reproduction, row_result
from ceat_fast.reproduce.scales import SCALES, Scale
from ceat_fast.reproduce.tables import failures, grids, verdicts

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
        seeds: trainings per row; default: those of the scale.
        only: names of rows to train and show; all by default.
        jobs: trainings at a time, each in a process of its own.
        device: where to compute.
        data_root: folder of the data sets.
        console: shows the progress.

    Raises:
        ValueError: an unknown experiment, scale or row, or a number below 1.
    """
    require_choice("experiment", name, EXPERIMENTS)
    require_choice("scale", scale, SCALES)
    experiment, size = EXPERIMENTS[name], SCALES[scale]
    for row in only:
        require_choice(f"row of {name}", row, {row.name for block in experiment.blocks for row in block.rows})
    count = size.seeds if seeds is None else seeds
    if not 1 <= count <= _SURROGATE_SEED:
        raise ValueError(f"seeds must be at least 1 and at most {_SURROGATE_SEED}, got {count}")
    session = _Session(experiment, size, Path(out) / scale, device, data_root, jobs, console or Console(quiet=True))
    result = session.run(list(only), count)
    write(result, session.root)
    return result


def write(result: Reproduction, folder: Path) -> None:
    """Write table, figure and numbers of a reproduction into `folder`."""
    name = result.experiment.name
    parts = [f"# {result.experiment.title}, scale {result.scale.name}", *(grid.markdown() for grid in grids(result))]
    sentences = "\n".join(f"* {sentence}" for sentence in (*verdicts(result), *failures(result)))
    parts += [sentences, f"![{result.experiment.title}]({name}.png)"]
    write_atomic(folder / f"{name}.md", ("\n\n".join(part for part in parts if part) + "\n").encode())
    write_atomic(folder / f"{name}.png", draw(result).png)
    write_json(folder / f"{name}.json", {**result.to_dict(), "environment": describe_environment()})


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

    def run(self, only: list[str], seeds: int) -> Reproduction:
        blocks = _distinct(self.experiment, self.scale)
        rows = {block.title: [row for row in block.rows if not only or row.name in only] for block in blocks}
        judgements = {block.title: self._judgements(block) for block in blocks}
        # Seed by seed, so that an interrupted experiment has all rows of the first seeds.
        cells = {
            (block.title, row.name, seed): self._cell(row.name, row.method, block, seed, judgements[block.title])
            for seed in range(seeds)
            for block in blocks
            for row in rows[block.title]
        }
        unique = {cell.folder: cell for cell in cells.values()}
        found = dict(zip(unique, run_cells(list(unique.values()), self.jobs, self.console), strict=True))
        results = []
        for block in blocks:
            outcomes = [
                (row, [(seed, found[cells[block.title, row.name, seed].folder]) for seed in range(seeds)])
                for row in rows[block.title]
            ]
            lines = [row_result(row, by_seed, self.scale, self.experiment.columns) for row, by_seed in outcomes]
            models = [self.scale.models[model] for model in block.models]
            results.append(BlockResult(block, self.scale.datasets[block.dataset], models, lines))
        return Reproduction(self.experiment, self.scale, results)

    def _judgements(self, block: Block) -> tuple[Judgement, ...]:
        if self.experiment.measure == "transfer":
            return (Transferred(self.scale.transfer),)
        if self.experiment.measure == "black box":
            surrogate = self._cell("surrogate", Standard(), block, _SURROGATE_SEED, ())
            run_cells([surrogate], 1, self.console)
            return (Attacked((), self.scale.transfer.images), BlackBox((surrogate.folder,), self.scale.transfer))
        return self.scale.judgements

    def _cell(self, name: str, method: Method, block: Block, seed: int, judgements: tuple[Judgement, ...]) -> Cell:
        config = self.scale.train_config(method, block.dataset, block.models, seed, self.experiment.per_epoch)
        return make_cell(f"{block.title}, {name}", config, judgements, self.root, self.device, self.data_root)


def _distinct(experiment: Experiment, scale: Scale) -> list[Block]:
    """Without blocks that would be another one's trainings at this scale."""
    blocks: dict[tuple[str, tuple[str, ...]], Block] = {}
    for block in experiment.blocks:
        models = tuple(scale.models[model] for model in block.models)
        blocks.setdefault((scale.datasets[block.dataset], models), block)
    return list(blocks.values())
