"""PEP 517 backend: setuptools, asking for torch and CMake only where there is a compiler to use them."""

from __future__ import annotations

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - a PEP 517 backend is the set of hooks in its module
from toolchain import REQUIREMENTS, no_compiler

Settings = dict[str, Any] | None


def _native_requirements() -> list[str]:
    return REQUIREMENTS if no_compiler() is None else []


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _native_requirements()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _native_requirements()
