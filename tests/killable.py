"""The command line in a process that can be killed; a fork server imports it once for many starts."""

from __future__ import annotations

import sys

import tiny_training  # noqa: F401
import torch
import torch._dynamo

import ceat_fast.reports  # noqa: F401
from ceat_fast.cli import build_parser, main

build_parser()  # like the modules above: what every start would import anew


def run(argv: list[str], threads: int) -> None:
    """`ceat-fast ARGV`; ends the process with its exit code."""
    torch.set_num_threads(threads)
    sys.exit(main(argv))
