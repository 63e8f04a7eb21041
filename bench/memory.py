"""Peak memory of one training step, in a process of its own; run by throughput.py."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def peak_memory(name: str, setting: dict[str, Any]) -> float:
    """Bytes that one step of that candidate takes at its peak: on a CPU of the whole process, above its start."""
    command = [sys.executable, str(Path(__file__)), name, json.dumps(setting)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(answer.split()[-1])


def main() -> None:
    from contenders import Setting, step_candidates

    name, setting = sys.argv[1], Setting(**json.loads(sys.argv[2]))
    step = step_candidates(setting, compiled=False)[name]
    on_gpu = setting.device.startswith("cuda")
    before = torch.cuda.memory_allocated() if on_gpu else resident()
    step()
    step()
    print((torch.cuda.max_memory_allocated() if on_gpu else highest()) - before)


def resident() -> int:
    """Bytes of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def highest() -> int:
    """Bytes of this process at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
