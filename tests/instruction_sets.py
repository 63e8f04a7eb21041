"""Code of a test with the CPU kernels of another instruction set, which a process chooses once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")


def run_with_isa(isa: str, code: str, *arguments: str) -> None:
    """Run `code`, which may import test modules, in its own process; a set that the CPU lacks means a lesser one."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"CEAT_FAST_CPU_ISA": isa, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment)
