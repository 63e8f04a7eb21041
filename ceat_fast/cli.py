"""Train, judge, compare and export robust ensembles. Options and help come from the typed settings."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from rich.console import Console

from ceat_fast import __version__
from ceat_fast.imports import search_working_directory
from ceat_fast.training.config import build_config, config_parser, setting_kinds, setting_names
from ceat_fast.training.refusals import readable
from ceat_fast.training.settings import AttackConfig, evaluation_attack

if TYPE_CHECKING:
    from ceat_fast.data import Dataset
    from ceat_fast.training.run import Run

DEBUG_VARIABLE = "CEAT_FAST_DEBUG"
USER_ERRORS = (ArgumentError, ValueError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (the run went wrong), 2 (wrong input), 130 (interrupted by
    Ctrl-C) or 143 (by SIGTERM); where a training run was interrupted, its state is saved."""
    from ceat_fast.training.interrupts import TrainingInterrupted
    from ceat_fast.training.watch import TrainingStoppedError

    argv = list(sys.argv[1:] if argv is None else argv)
    search_working_directory()  # for methods of the user's
    parser, commands = build_parser()
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    try:
        arguments = parser.parse_args(argv)
        COMMANDS[arguments.command](arguments[arguments.command], argv, commands[arguments.command])
    except TrainingInterrupted as interruption:
        return _fail(f"{interruption}; {_continuation(argv)}", interruption.exit_code)
    except KeyboardInterrupt:
        return _fail(f"interrupted; {_continuation(argv)}", 130)
    except TrainingStoppedError as error:
        return _fail(str(error), 1)
    except USER_ERRORS as error:
        return _fail(_readable(error, argv[0] if argv else "", commands), 2)
    return 0


def build_parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The parser, and those of its commands."""
    parser = ArgumentParser(
        prog="ceat-fast", description=__doc__.partition(" Options")[0], exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--version", action="version", version=f"ceat-fast {__version__}", help="Show the version and exit."
    )
    subcommands = parser.add_subcommands(dest="command")
    commands = {
        "train": config_parser(with_config_option=True),
        "evaluate": _evaluate_parser(),
        "transfer": _transfer_parser(),
        "report": _report_parser(),
        "reproduce": _reproduce_parser(),
        "compare": _compare_parser(),
        "export": _export_parser(),
        "info": _parser("Show versions, devices and which backends exist."),
    }
    commands["train"].description = "Train an ensemble."
    for name, command in commands.items():
        subcommands.add_subcommand(name, command, help=command.description)
    return parser, commands


def _parser(description: str) -> ArgumentParser:
    return ArgumentParser(exit_on_error=False, allow_abbrev=False, description=description)


def _evaluate_parser() -> ArgumentParser:
    from ceat_fast.evaluation.protocol import EvaluationConfig
    from ceat_fast.evaluation.sources import SourceOptions

    parser = _parser("Judge a model, an ensemble and each of its members: clean, attacked, and whether to trust that.")
    what = (
        "Run folder, checkpoint, weights file, or module:function of your own that returns a model. "
        "A run is judged by its own evaluation settings where no attack.* is given."
    )
    parser.add_argument("model", type=str, help=what)
    parser.add_class_arguments(AttackConfig, "attack")
    parser.set_defaults({"attack": asdict(evaluation_attack())})
    parser.add_class_arguments(EvaluationConfig)
    parser.add_class_arguments(SourceOptions)
    parser.add_argument(
        "--out", type=str | None, default=None, help="Folder for journal and result, new or to continue."
    )
    return parser


def _transfer_parser() -> ArgumentParser:
    from ceat_fast.evaluation import TransferConfig

    parser = _parser("Test how attacks transfer: between the members of a run, and from surrogates to its ensemble.")
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_argument("--surrogates", type=str, nargs="+", default=[], help="Run folders of surrogate ensembles.")
    parser.add_argument("--out", type=str | None, default=None, help="Folder for the results; default: the run's.")
    _add_data_root(parser)
    parser.add_class_arguments(TransferConfig)
    return parser


def _report_parser() -> ArgumentParser:
    parser = _parser("Write an HTML report of one or several evaluations.")
    parser.add_argument("folders", type=str, nargs="+", help="Run folders, or other folders with an evaluation.json.")
    parser.add_argument("--out", type=str, default="report.html", help="The HTML file to write; must not exist.")
    what = "Folder for the same as JSON, CSV and PNG files; new or empty."
    parser.add_argument("--files", type=str | None, default=None, help=what)
    return parser


def _compare_parser() -> ArgumentParser:
    parser = _parser("Write an HTML page that compares evaluations.")
    parser.add_argument("folders", type=str, nargs="+", help="As for report, at least two; the first is the baseline.")
    parser.add_argument("--out", type=str, default="comparison.html", help="The HTML file to write; must not exist.")
    return parser


def _export_parser() -> ArgumentParser:
    parser = _parser("Write a run's members, ensemble and model card to a folder.")
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_argument("--out", type=str, default="export", help="The folder to write; new or empty.")
    parser.add_argument("--checkpoint", type=str, default="last", help="Which weights: last, or best.")
    parser.add_argument("--program", type=bool, default=True, help="Write the torch.export program too.")
    _add_data_root(parser)
    return parser


def _add_data_root(parser: ArgumentParser) -> None:
    parser.add_argument("--data.root", type=str | None, default=None, help="Folder of the data's files; as the run's.")


def _reproduce_parser() -> ArgumentParser:
    from ceat_fast.reproduce import EXPERIMENTS, SCALES

    parser = _parser("Reproduce a table or figure of the paper: train and judge what is missing, and compare.")
    parser.add_argument("experiment", type=str, help=f"One of {', '.join(EXPERIMENTS)}.")
    parser.add_argument(
        "--scale", type=str, default="smoke", help=f"One of {', '.join(SCALES)} (docs/reproduction.md)."
    )
    parser.add_argument("--out", type=str, default="runs/reproduce", help="Folder for everything, new or to continue.")
    parser.add_argument("--seeds", type=int | None, default=None, help="Trainings per row; default: the scale's.")
    parser.add_argument("--only", type=str, nargs="+", default=[], help="Rows to train and show; all by default.")
    parser.add_argument("--jobs", type=int, default=1, help="Trainings at a time, each in a process of its own.")
    parser.add_argument("--data_root", type=str | None, default=None, help="Folder of the data sets.")
    parser.add_argument("--device", type=str, default="auto", help="Where to compute, as for train.")
    return parser


def _train(arguments: Namespace, argv: list[str], parser: ArgumentParser) -> None:
    from ceat_fast.reports import write_training_figures
    from ceat_fast.training.distributed import process_group
    from ceat_fast.training.trainer import Trainer
    from ceat_fast.training.watch import TrainingStoppedError

    arguments.pop("config")
    config = build_config(arguments)
    with process_group(config.device):
        trainer = Trainer(config)
        try:
            records = trainer.fit()
        except TrainingStoppedError:
            if trainer.layout.is_main:
                write_training_figures(trainer.run)
            raise
        if not records:
            raise ValueError(f"{trainer.run.metrics_path} lacks the finished epochs")
        if trainer.layout.is_main:
            figures = write_training_figures(trainer.run)
            epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
            Console().print(
                f"{trainer.run.folder}: {epochs}, loss {records[-1]['loss']:.3f}\n"
                f"figures: {figures[0].parent}\n"
                f"next: ceat-fast evaluate {shlex.quote(str(trainer.run.folder))}",
                highlight=False,
                soft_wrap=True,
            )


def _evaluate(arguments: Namespace, argv: list[str], parser: ArgumentParser) -> None:
    from ceat_fast.evaluation.protocol import EvaluationConfig
    from ceat_fast.evaluation.runs import evaluate_source
    from ceat_fast.evaluation.shards import is_main_process
    from ceat_fast.evaluation.sources import SourceOptions, find_source
    from ceat_fast.reports.tables import check_table, score_table

    def settings(kind: type[Any]) -> Any:
        return kind(**{setting.name: values[setting.name] for setting in fields(kind)})

    values = parser.instantiate(arguments)
    source = find_source(arguments.model, settings(SourceOptions))
    parser.set_defaults({"attack": asdict(source.attack)})
    values = parser.instantiate(parser.parse_args(argv[1:]))
    config = settings(EvaluationConfig)
    result, path = evaluate_source(
        source, config, attack=values.attack, out=arguments.out, console=Console(stderr=True)
    )
    if is_main_process():
        Console().print(score_table({source.about["name"]: result}))
        Console().print(check_table(result))
        Console().print(f"written: {path}", highlight=False, soft_wrap=True)


def _transfer(arguments: Namespace, argv: list[str], parser: ArgumentParser) -> None:
    from ceat_fast.evaluation import BlackBoxResult, TransferConfig, TransferMatrix, transfer_run
    from ceat_fast.reports.tables import black_box_table, transfer_table
    from ceat_fast.training.run import Run

    console = Console()
    run, *surrogates = (Run.open(folder) for folder in (arguments.run, *arguments.surrogates))
    config = TransferConfig(**{setting.name: arguments[setting.name] for setting in fields(TransferConfig)})

    def show(result: TransferMatrix | BlackBoxResult) -> None:
        console.print(transfer_table(result) if isinstance(result, TransferMatrix) else black_box_table(result))

    transfer_run(
        run, surrogates, config, out=arguments.out, dataset=_dataset(run, arguments), show=show, console=console
    )
    console.print(f"written: {arguments.out or run.folder}", highlight=False, soft_wrap=True)


def _report(arguments: Namespace, argv: list[str], parser: ArgumentParser) -> None:
    from ceat_fast.reports import write_report

    path = write_report(arguments.folders, arguments.out, files=arguments.files)
    Console().print(f"written: {path}", highlight=False, soft_wrap=True)


def _compare(arguments: Namespace, argv: list[str], parser: ArgumentParser) -> None:
    from ceat_fast.reports import write_comparison

    path = write_comparison(arguments.folders, arguments.out)
    Console().print(f"written: {path}", highlight=False, soft_wrap=True)


def _export(arguments: Namespace, argv: list[str], parser: ArgumentParser) -> None:
    from ceat_fast.export import export_run
    from ceat_fast.training.run import Run

    run = Run.open(arguments.run)
    options = {"checkpoint": arguments.checkpoint, "program": arguments.program, "dataset": _dataset(run, arguments)}
    path = export_run(run, arguments.out, **options)
    Console().print(f"written: {path}", highlight=False, soft_wrap=True)


def _dataset(run: Run, arguments: Namespace) -> Dataset | None:
    """The run's data in the folder that the user gives, if one."""
    from ceat_fast.data import load_dataset

    root = arguments.data.root
    return None if root is None else load_dataset(run.config.data.name, root)


def _reproduce(arguments: Namespace, argv: list[str], parser: ArgumentParser) -> None:
    from ceat_fast.reproduce import reproduce
    from ceat_fast.reproduce.tables import grids, sentences

    options = {name: value for name, value in vars(arguments).items() if name != "experiment"}
    result = reproduce(arguments.experiment, **options, console=Console(stderr=True))
    for grid in grids(result):
        grid.print()
    console = Console()
    for sentence in sentences(result):
        console.print(sentence, highlight=False, soft_wrap=True)
    where = f"{arguments.out}/{arguments.scale}/{arguments.experiment}"
    console.print(f"written: {where}.md, .png, .json", highlight=False, soft_wrap=True)


def _info(arguments: Namespace, argv: list[str], parser: ArgumentParser) -> None:
    from rich.pretty import pprint

    import ceat_fast
    from ceat_fast.ensemble.tuning import cache_path, remembered
    from ceat_fast.environment import describe_environment

    executions = {"remembered in": str(cache_path()), "choices": remembered()}
    info = {"build": ceat_fast.build_info(), "environment": describe_environment(), "executions": executions}
    pprint(info, expand_all=True)


COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "transfer": _transfer,
    "report": _report,
    "compare": _compare,
    "export": _export,
    "reproduce": _reproduce,
    "info": _info,
}


def _continuation(argv: Sequence[str]) -> str:
    return f"the same command {'with --resume true ' if argv[:1] == ['train'] else ''}continues"


def _fail(message: str, code: int) -> int:
    if os.environ.get(DEBUG_VARIABLE) == "1" and sys.exc_info()[1] is not None:
        raise
    print(f"ceat-fast: error: {message}", file=sys.stderr)
    return code


def _readable(error: BaseException, command: str, commands: dict[str, ArgumentParser]) -> str:
    """The message on one line, with the nearest valid name for one that is not."""
    if not isinstance(error, ArgumentError):
        return " ".join(str(error).split())
    if command == "train":
        return readable(str(error), setting_names(), setting_kinds())
    names = {action.dest for action in commands[command]._actions} if command in commands else set(commands)
    return readable(str(error), names, {})
