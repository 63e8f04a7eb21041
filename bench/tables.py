"""Tables of throughput.py."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def rate_table(title: str, results: list[dict[str, Any]], peaks: dict[str, float]) -> Table:
    table = Table(title=title)
    for heading in (
        "attack in",
        "way",
        "seconds (quartiles)",
        "images/s",
        "ceat_fast is faster by",
        "of the GEMM rate",
    ):
        table.add_column(heading, justify="left" if heading in ("attack in", "way") else "right")
    for result in results:
        for name, seconds in result["seconds"].items():
            precision = result["setting"]["precision"] if name != "author" else "fp32"
            share = ""
            if name == "ceat_fast" and "attack_flops" in result:
                rate = result["attack_flops"] / seconds["median"]
                share = f"{rate / peaks[f'gemm_{precision}_flops']:.0%}"
            table.add_row(
                precision,
                name,
                f"{seconds['median']:.3g} ({seconds['low']:.3g} to {seconds['high']:.3g})",
                f"{result['images_per_second'][name]:,.0f}",
                f"{result['speedup'][name]:.2f}x",
                share,
            )
        table.add_section()
    return table


def ladder_table(seconds: dict[str, dict[str, float]], precision: str) -> Table:
    table = Table(title=f"PGD-2, one optimisation after the other ({precision})")
    for heading in ("way", "seconds", "faster than author by"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for name, timing in seconds.items():
        table.add_row(name, f"{timing['median']:.3g}", f"{seconds['author']['median'] / timing['median']:.2f}x")
    return table


def loss_table(results: list[dict[str, Any]], copy_rate: float) -> Table:
    table = Table(title="CEAT loss, forward and backward")
    for heading in ("(M, B, K)", "type", "microseconds", "eager", "GB/s", "of the copy rate"):
        table.add_column(heading, justify="right")
    for result in results:
        rate = result["bytes_per_second"]
        table.add_row(
            str(tuple(result["size"])),
            result["dtype"],
            f"{result['seconds']['ceat_fast']['median'] * 1e6:,.0f}",
            f"{result['seconds']['eager']['median'] * 1e6:,.0f}",
            f"{rate / 1e9:.2f}",
            f"{rate / copy_rate:.0%}",
        )
    return table


def memory_table(peaks: dict[str, dict[str, int]]) -> Table:
    table = Table(title="Peak memory of a training step, MiB")
    for heading in ("way", "allocated by torch", "of the process"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for name, peak in peaks.items():
        table.add_row(name, *(f"{peak[kind] / 2**20:,.1f}" for kind in ("allocated", "resident")))
    return table


def growth_table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="PGD as one thing grows")
    for heading in ("varied", "value", "author, s", "ceat_fast, s", "faster by", "author, MiB", "ceat_fast, MiB"):
        table.add_column(heading, justify="right")
    for result in results:
        seconds = {name: timing["median"] for name, timing in result["seconds"].items()}
        mebibytes = {name: peak / 2**20 for name, peak in result["peak_bytes"].items()}
        table.add_row(
            result["varied"],
            str(result["setting"][result["varied"]]),
            f"{seconds['author']:.3g}",
            f"{seconds['ceat_fast']:.3g}",
            f"{result['speedup']['author']:.2f}x",
            f"{mebibytes['author']:,.0f}",
            f"{mebibytes['ceat_fast']:,.0f}",
        )
    return table
