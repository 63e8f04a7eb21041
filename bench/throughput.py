"""What ceat_fast gains on this machine: PGD, the CEAT training step and the loss, against what one would use otherwise.

    python bench/throughput.py [--quick] [--out FOLDER]

Prints tables, and writes throughput.json and figures into the folder. All times of a comparison are taken in turn
(interleaved rounds) in one process; figures are medians. bench/peers.py holds the loops that we are compared with.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peers
import torch
from ceilings import ceilings
from contenders import DTYPES, Setting, attack_flops, ladder_candidates, pgd_candidates, step_candidates
from figures import bar_figure, growth_figure, loss_figure
from memory import allocated, step_memory
from records import write_record
from rich.console import Console
from tables import growth_table, ladder_table, loss_table, memory_table, rate_table
from timing import Timing, compare
from torch import Tensor

from ceat_fast.ensemble import resolve_precision
from ceat_fast.environment import describe_environment
from ceat_fast.loss import ceat_loss

PARTS = ("pgd", "step", "ladder", "memory", "growth", "loss")
LOSS_GRID = ((3, 128, 10), (3, 128, 100), (8, 512, 10), (3, 1024, 1000), (3, 4096, 1000))


def measure_pgd(setting: Setting, compiled: bool, rounds: int) -> dict[str, Any]:
    timings = compare(pgd_candidates(setting, compiled), rounds=rounds, device=setting.device)
    return record(setting, timings) | {"attack_flops": attack_flops(setting)}


def measure_step(setting: Setting, compiled: bool, rounds: int) -> dict[str, Any]:
    return record(setting, compare(step_candidates(setting, compiled), rounds=rounds, device=setting.device))


def record(setting: Setting, timings: dict[str, Timing]) -> dict[str, Any]:
    ours = timings["ceat_fast"].median
    return {
        "setting": asdict(setting),
        "seconds": {name: timing.as_dict() for name, timing in timings.items()},
        "images_per_second": {name: setting.batch / timing.median for name, timing in timings.items()},
        "speedup": {name: timing.median / ours for name, timing in timings.items()},
    }


def measure_growth(setting: Setting, quick: bool, rounds: int) -> list[dict[str, Any]]:
    """Author-style attack against ours as members, batch, width and steps grow, one at a time: seconds and memory."""
    small = replace(setting, model="resnet20", batch=32, steps=2)
    grid = {"members": (1, 2, 4, 8), "batch": (8, 32, 128), "width": (8, 16, 32), "steps": (1, 4, 16)}
    if quick:
        grid = {"members": (1, 3)}
    results = []
    for name, values in grid.items():
        for value in values:
            at = replace(small, **{name: value})
            every = pgd_candidates(at, compiled=False)
            candidates = {way: every[way] for way in ("author", "ceat_fast")}
            timings = compare(candidates, rounds=rounds, device=at.device)
            new = pgd_candidates(at, compiled=False) if at.device.startswith("cuda") else candidates
            bytes_at_peak = {way: allocated(new[way], at.device) for way in candidates}
            results.append({"varied": name} | record(at, timings) | {"peak_bytes": bytes_at_peak})
    return results


def measure_loss(device: str, quick: bool, rounds: int, dtypes: dict[str, torch.dtype]) -> list[dict[str, Any]]:
    """The fused loss over a grid, forward and backward; bytes: logits read, gradients written, once each."""
    results = []
    for members, samples, classes in LOSS_GRID[:3] if quick else LOSS_GRID:
        for dtype_name, dtype in dtypes.items():
            torch.manual_seed(0)
            adv, nat = (
                torch.randn(members, samples, classes, device=device).to(dtype).requires_grad_() for _ in range(2)
            )
            target = torch.randint(0, classes, (samples,), device=device)
            candidates = {
                "ceat_fast": loss_call(lambda a, n, t: ceat_loss(a, n, t, lam=1, mu=5).sum(), adv, nat, target),
                "eager": loss_call(peers.vectorised_loss, adv, nat, target),
            }
            timings = compare(candidates, rounds=rounds, device=device)
            moved = 4 * adv.numel() * adv.element_size()
            results.append(
                {
                    "size": [members, samples, classes],
                    "dtype": dtype_name,
                    "seconds": {name: timing.as_dict() for name, timing in timings.items()},
                    "bytes": moved,
                    "bytes_per_second": moved / timings["ceat_fast"].median,
                }
            )
    return results


def loss_call(loss: Callable[..., Tensor], adv: Tensor, nat: Tensor, target: Tensor) -> Callable[[], object]:
    def call() -> None:
        adv.grad = nat.grad = None
        loss(adv, nat, target).backward()

    return call


def measure_memory(setting: Setting) -> dict[str, dict[str, int]]:
    """Peak bytes of training steps, each way in a process of its own."""
    return {name: step_memory(name, asdict(setting)) for name in ("author", "eager", "ceat_fast")}


def run(arguments: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """All parts that were asked for: measures and prints; the record so far, after each part."""
    setting = Setting(
        model=arguments.model,
        members=arguments.members,
        batch=arguments.batch,
        steps=arguments.steps,
        device=arguments.device,
        compile_mode=arguments.compile_mode,
    )
    members = setting.build()
    native = resolve_precision("auto", members[0])
    precisions = list(dict.fromkeys(["fp32", native])) if arguments.precision == "auto" else [arguments.precision]
    dtypes = {name: DTYPES[name] for name in precisions}
    peaks = ceilings(setting.device, dtypes)
    console.print(
        f"{describe_environment()['cpu'] if setting.device == 'cpu' else torch.cuda.get_device_name()}: "
        + ", ".join(f"GEMM {name} {peaks[f'gemm_{name}_flops'] / 1e9:,.0f} GFLOP/s" for name in dtypes)
        + f", copy {peaks['copy_bytes'] / 1e9:.1f} GB/s",
        highlight=False,
    )
    settings = [replace(setting, precision=name) for name in precisions]
    compiled, rounds = not arguments.quick, arguments.rounds
    report: dict[str, Any] = {"ceilings": peaks}
    described = f"M={setting.members} {setting.model}, B={setting.batch}, PGD-{setting.steps}"
    if "pgd" in arguments.parts:
        report["pgd"] = [measure_pgd(s, compiled, rounds) for s in settings]
        console.print(rate_table(f"Attack: {described}", report["pgd"], peaks))
        yield report
    if "step" in arguments.parts:
        report["step"] = [measure_step(s, compiled, rounds) for s in settings]
        console.print(rate_table(f"CEAT training step: {described}", report["step"], peaks))
        yield report
    if "ladder" in arguments.parts:
        shorter = replace(settings[-1], steps=2)
        timings = compare(ladder_candidates(shorter, compiled), rounds=rounds, device=setting.device)
        report["ladder"] = {name: timing.as_dict() for name, timing in timings.items()}
        console.print(ladder_table(report["ladder"], shorter.precision))
        yield report
    if "memory" in arguments.parts:
        report["memory"] = measure_memory(settings[-1])
        console.print(memory_table(report["memory"]))
        yield report
    if "growth" in arguments.parts:
        report["growth"] = measure_growth(settings[-1], arguments.quick, rounds)
        console.print(growth_table(report["growth"]))
        yield report
    if "loss" in arguments.parts:
        report["loss"] = measure_loss(setting.device, arguments.quick, max(rounds, 11), dtypes)
        console.print(loss_table(report["loss"], peaks["copy_bytes"]))
        yield report


def write(report: dict[str, Any], folder: Path) -> None:
    write_record(folder / "throughput.json", report)
    for name in ("pgd", "step"):
        if name in report:
            bar_figure(report[name], folder / f"{name}.png")
    if "growth" in report:
        growth_figure(report["growth"], folder / "growth.png")
    if "loss" in report:
        loss_figure(report["loss"], report["ceilings"]["copy_bytes"], folder / "loss.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, without torch.compile: within 90 s")
    parser.add_argument("--out", type=Path, default=Path("runs/throughput"), help="folder for JSON and figures")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="what to measure; default: all (--quick: not memory and ladder)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("auto", *DTYPES), default="auto", help="auto: fp32, and bf16 if native")
    parser.add_argument("--compile_mode", help="mode of torch.compile for the loop that we are compared with")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--batch", type=int, help="default 128 (--quick: 32)")
    parser.add_argument("--steps", type=int, help="PGD steps, default 10 (--quick: 2)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds of long measurements, default 3 (--quick: 2)")
    arguments = parser.parse_args()
    arguments.parts = arguments.parts or [p for p in PARTS if not (arguments.quick and p in ("memory", "ladder"))]
    arguments.batch = arguments.batch or (32 if arguments.quick else 128)
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 3)
    arguments.steps = arguments.steps or (2 if arguments.quick else 10)
    return arguments


def main() -> None:
    arguments = parse()
    torch.backends.cudnn.benchmark = True  # for all candidates: every shape comes many times
    console = Console(width=max(110, Console().width))
    start = time.perf_counter()
    for report in run(arguments, console):
        write(report, arguments.out)
    console.print(f"{time.perf_counter() - start:.0f} s; written: {arguments.out}/throughput.json and figures")


if __name__ == "__main__":
    main()
