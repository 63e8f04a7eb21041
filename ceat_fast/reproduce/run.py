"""Run an experiment: train and judge what is missing, set it beside the paper, write table, figure and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from ceat_fast.choices import require_choice
from ceat_fast.environment import describe_environment
from ceat_fast.files import PathLike, write_atomic, write_json
from ceat_fast.reproduce.cells import Cell, make_cell, run_cells
from ceat_fast.reproduce.experiments import EXPERIMENTS, Block, Experiment, Row
from ceat_fast.reproduce.figures import draw
from ceat_fast.reproduce.outcome import BlockResult, Reproduction, row_result
from ceat_fast.reproduce.scales import SCALES, Scale
from ceat_fast.reproduce.tables import failures, grids, verdicts


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
    if count < 1:
        raise ValueError(f"seeds must be at least 1, got {count}")
    root = Path(out) / scale
    places = list(_places(experiment, size, only, count))
    cells = [
        make_cell(
            f"{block.title}, {row.name}",
            size.train_config(row.method, block.dataset, block.models, seed),
            size.judgements,
            root,
            device,
            data_root,
        )
        for seed, block, row in places
    ]
    unique: dict[Path, Cell] = {cell.folder: cell for cell in cells}
    found = dict(zip(unique, run_cells(list(unique.values()), jobs, console or Console(quiet=True)), strict=True))
    outcomes = {
        (block.title, row.name, seed): found[cell.folder]
        for (seed, block, row), cell in zip(places, cells, strict=True)
    }
    blocks = []
    for block in _distinct(experiment, size):
        rows = [row for row in block.rows if not only or row.name in only]
        results = [
            row_result(
                row, [(seed, outcomes[block.title, row.name, seed]) for seed in range(count)], size, experiment.columns
            )
            for row in rows
        ]
        blocks.append(BlockResult(block, size.datasets[block.dataset], [size.models[m] for m in block.models], results))
    result = Reproduction(experiment, size, blocks)
    write(result, root)
    return result


def write(result: Reproduction, folder: Path) -> None:
    """Write table, figure and numbers of a reproduction into `folder`."""
    name = result.experiment.name
    parts = [f"# {result.experiment.title}, scale {result.scale.name}", *(grid.markdown() for grid in grids(result))]
    parts += [*verdicts(result), *failures(result), f"![{result.experiment.title}]({name}.png)"]
    write_atomic(folder / f"{name}.md", ("\n\n".join(parts) + "\n").encode())
    write_atomic(folder / f"{name}.png", draw(result).png)
    write_json(folder / f"{name}.json", {**result.to_dict(), "environment": describe_environment()})


def _distinct(experiment: Experiment, scale: Scale) -> list[Block]:
    """Without blocks that would be another one's trainings at this scale."""
    blocks: dict[tuple[str, tuple[str, ...]], Block] = {}
    for block in experiment.blocks:
        models = tuple(scale.models[model] for model in block.models)
        blocks.setdefault((scale.datasets[block.dataset], models), block)
    return list(blocks.values())


def _places(experiment: Experiment, scale: Scale, only: Sequence[str], seeds: int) -> Iterator[tuple[int, Block, Row]]:
    """Seed by seed, so that an interrupted experiment has all rows of the first seeds."""
    for seed in range(seeds):
        for block in _distinct(experiment, scale):
            for row in block.rows:
                if not only or row.name in only:
                    yield seed, block, row
