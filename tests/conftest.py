"""Devices, backends and the --slow switch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ceat_fast.ops import dispatch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))


def runnable_backends() -> list[tuple[str, str]]:
    """(impl, device) pairs that run on this machine; the list grows by itself where there is a GPU."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [
        (impl, device) for device in devices for impl in dispatch.BACKENDS if dispatch.missing(impl, device) is None
    ]


@pytest.fixture(params=runnable_backends(), ids="-".join)
def backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Every backend on every device that it runs on: (impl, device)."""
    pair: tuple[str, str] = request.param
    return pair


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top of the source tree."""
    return Path(__file__).parent.parent
