"""Whether and for what the native parts can be built here. Shared by setup.py and the build backend."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys

# What building the native parts needs besides a C++ compiler.
REQUIREMENTS = ["cmake>=3.25", "ninja", "pybind11>=2.13", "torch>=2.10"]


def native_mode() -> str:
    """CEAT_FAST_NATIVE: "auto", "on" or "off"."""
    return _mode("CEAT_FAST_NATIVE")


def cuda_mode() -> str:
    """CEAT_FAST_CUDA: "auto", "on" or "off"."""
    return _mode("CEAT_FAST_CUDA")


def _mode(variable: str) -> str:
    value = os.environ.get(variable, "auto").lower()
    if value not in ("auto", "on", "off"):
        sys.exit(f"{variable} must be auto, on or off, got {value!r}")
    return value


def no_compiler() -> str | None:
    """Why no C++ can be compiled here, or None."""
    if native_mode() == "off":
        return "not built: CEAT_FAST_NATIVE=off"
    if not sys.platform.startswith("linux"):
        return f"not built: the native parts support Linux, not {sys.platform}"
    candidates = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, candidates)):
        return f"not built: no C++ compiler found ({', '.join(candidates)})"
    return None


def not_buildable() -> str | None:
    """Why the native parts cannot be built in this environment, or None."""
    reason = no_compiler()
    if reason is None:
        absent = [name for name in ("torch", "pybind11") if importlib.util.find_spec(name) is None]
        absent += [name for name in ("cmake", "ninja") if shutil.which(name) is None]
        if absent:
            reason = f"not built: {', '.join(absent)} not found in the build environment"
    return reason


def cuda_architectures(arch_list: str) -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX") as a CMake architecture list ("80-real;90a")."""
    architectures = []
    for entry in re.split(r"[;,\s]+", arch_list.strip()):
        if not entry:
            continue
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: cannot read {entry!r}; write numbers such as 8.0, 9.0a or 12.0+PTX")
        major, minor, suffix, ptx = match.groups()
        architectures.append(f"{major}{minor}{suffix}{'' if ptx else '-real'}")
    return ";".join(architectures)
