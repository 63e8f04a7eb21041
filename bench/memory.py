"""Peak memory: what torch allocates during a call, and what a process of its own takes for a training step.

The first can be repeated to the byte. The second has the libraries' own buffers in it, and what malloc keeps.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

_CALLS_UNTIL_REPLAYS = 4


def allocated(call: Callable[[], object], device: str) -> int:
    """Bytes that torch has allocated at the peak of a call, above those before it.

    On a GPU what it has reserved at the end of a few calls, the first ones: what a CUDA graph holds counts as free
    between its replays.
    """
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for _ in range(_CALLS_UNTIL_REPLAYS):
            call()
        return torch.cuda.memory_reserved() - before
    with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        now += change
        peak = max(peak, now)
    return peak


def step_memory(name: str, setting: dict[str, Any]) -> dict[str, int]:
    """Peak bytes of that candidate's first two training steps, in a process of its own: allocated and resident."""
    command = [sys.executable, str(Path(__file__)), name, json.dumps(setting)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peaks: dict[str, int] = json.loads(answer.splitlines()[-1])
    return peaks


def main() -> None:
    from contenders import Setting, step_candidates

    name, setting = sys.argv[1], Setting(**json.loads(sys.argv[2]))
    step = step_candidates(setting, compiled=False)[name]

    def two_steps() -> None:
        step()
        step()

    before = resident()
    two_steps()
    peaks = {"resident": highest() - before}
    # A fresh one: what it keeps between steps counts too. The attack's length makes no difference to the peak.
    step = step_candidates(replace(setting, steps=2), compiled=False)[name]
    print(json.dumps(peaks | {"allocated": allocated(two_steps, setting.device)}))


def resident() -> int:
    """Bytes of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def highest() -> int:
    """Bytes of this process at most so far; getrusage would count what its parent had when it began."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main()
