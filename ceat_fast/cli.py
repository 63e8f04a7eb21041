"""The command line: `ceat-fast train | evaluate | report | info`. Options and help come from the typed settings."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from rich.console import Console

from ceat_fast.methods import METHODS
from ceat_fast.training.config import AttackConfig, build_config, config_parser

DEBUG_VARIABLE = "CEAT_FAST_DEBUG"
USER_ERRORS = (ArgumentError, ValueError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (the run failed), 2 (wrong input) or 130 (interrupted)."""
    from ceat_fast.training.trainer import NonFiniteLossError

    argv = list(sys.argv[1:] if argv is None else argv)
    parser, commands = build_parser()
    try:
        arguments = parser.parse_args(argv)
        COMMANDS[arguments.command](arguments[arguments.command], argv, commands[arguments.command])
    except KeyboardInterrupt:
        return _fail("interrupted; a training run continues with --resume true", 130)
    except NonFiniteLossError as error:
        return _fail(str(error), 1)
    except USER_ERRORS as error:
        return _fail(_readable(error, commands), 2)
    return 0


def build_parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The parser, and those of its commands."""
    parser = ArgumentParser(
        prog="ceat-fast", description=__doc__.partition(" Options")[0], exit_on_error=False, allow_abbrev=False
    )
    subcommands = parser.add_subcommands(dest="command")
    commands = {
        "train": config_parser(with_config_option=True),
        "evaluate": _evaluate_parser(),
        "report": _report_parser(),
        "info": ArgumentParser(
            exit_on_error=False, allow_abbrev=False, description="Show versions, devices and which backends exist."
        ),
    }
    commands["train"].description = "Train an ensemble."
    for name, command in commands.items():
        subcommands.add_subcommand(name, command, help=command.description)
    return parser, commands


def _evaluate_parser() -> ArgumentParser:
    parser = ArgumentParser(
        exit_on_error=False, allow_abbrev=False, description="Judge a run: clean and PGD, ensemble and each member."
    )
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_class_arguments(AttackConfig, "attack")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the attack noise.")
    parser.add_argument("--images", type=int | None, default=None, help="Use only the first so many test images.")
    parser.add_argument("--batch_size", type=int, default=500, help="Images per pass; does not change the result.")
    parser.add_argument("--device", type=str, default="auto", help="Where to compute, as for train.")
    return parser


def _report_parser() -> ArgumentParser:
    parser = ArgumentParser(
        exit_on_error=False, allow_abbrev=False, description="Write an HTML report of one or several evaluated runs."
    )
    parser.add_argument("runs", type=str, nargs="+", help="Run folders.")
    parser.add_argument("--out", type=str, default="report.html", help="The HTML file to write; must not exist.")
    parser.add_argument("--device", type=str, default="auto", help="Where to compute the adversarial examples.")
    return parser


def _train(arguments: Namespace, argv: list[str], parser: ArgumentParser) -> None:
    from ceat_fast.training.trainer import Trainer

    arguments.pop("config")
    trainer = Trainer(build_config(arguments))
    records = trainer.fit()
    last = records[-1]
    Console().print(
        f"{trainer.run.folder}: {last['epoch']} epochs, loss {last['loss']:.3f}, adversarial training accuracy "
        f"{last['train_adv_accuracy']:.1%}\nnext: ceat-fast evaluate {trainer.run.folder}",
        highlight=False,
        soft_wrap=True,
    )


def _evaluate(arguments: Namespace, argv: list[str], parser: ArgumentParser) -> None:
    from ceat_fast.evaluation import evaluate_run
    from ceat_fast.reports.tables import score_table
    from ceat_fast.training.run import Run

    run = Run.open(arguments.run)
    parser.set_defaults({"attack": asdict(run.config.evaluation)})
    arguments = parser.parse_args(argv[1:])
    attack = parser.instantiate(arguments).attack
    result = evaluate_run(
        run,
        attack,
        seed=arguments.seed,
        images=arguments.images,
        batch_size=arguments.batch_size,
        device=arguments.device,
    )
    Console().print(score_table({run.config.method.label: result}))
    Console().print(f"written: {run.evaluation_path}", highlight=False, soft_wrap=True)


def _report(arguments: Namespace, argv: list[str], parser: ArgumentParser) -> None:
    from ceat_fast.reports import write_report

    path = write_report([Path(run) for run in arguments.runs], Path(arguments.out), device=arguments.device)
    Console().print(f"written: {path}", highlight=False, soft_wrap=True)


def _info(arguments: Namespace, argv: list[str], parser: ArgumentParser) -> None:
    from rich.pretty import pprint

    import ceat_fast
    from ceat_fast.environment import describe_environment

    pprint({"build": ceat_fast.build_info(), "environment": describe_environment()}, expand_all=True)


COMMANDS = {"train": _train, "evaluate": _evaluate, "report": _report, "info": _info}


def _fail(message: str, code: int) -> int:
    if os.environ.get(DEBUG_VARIABLE) == "1" and sys.exc_info()[1] is not None:
        raise
    print(f"ceat-fast: error: {message}", file=sys.stderr)
    return code


def _readable(error: BaseException, commands: dict[str, ArgumentParser]) -> str:
    """The message on one line, with the nearest valid name for a word in it that nearly is one."""
    message = " ".join(str(error).split())
    if not isinstance(error, ArgumentError) and "config file" not in message:
        return message
    names = {action.dest for command in commands.values() for action in command._actions} | set(METHODS)
    names |= set(commands)
    names |= {name for method in METHODS.values() for name in method().settings}
    if 'key "method"' in message:
        message += f" (methods: {', '.join(METHODS)}, or the import path of your own)"
    return message + _did_you_mean(message, names)


def _did_you_mean(message: str, names: set[str]) -> str:
    folded = {name.lower(): name for name in sorted(names)}
    for word in re.findall(r"[A-Za-z_][\w.]*", message):
        nearest = difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.75)
        if word not in names and nearest:
            return f"; did you mean {folded[nearest[0]]!r}?"
    return ""
