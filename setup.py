"""Builds the native parts: setuptools calls CMake and Ninja once, through one extension that stands for all libraries.

Environment variables:
    CEAT_FAST_NATIVE=auto|on|off   C++ and CUDA parts; "on" makes a missing tool an error
    CEAT_FAST_CUDA=auto|on|off     the CUDA part; built wherever nvcc is found, GPU or not
    TORCH_CUDA_ARCH_LIST           e.g. "9.0" or "8.0;9.0+PTX"; default: 8.0, 9.0, 10.0, 12.0 and PTX
    MAX_JOBS                       compile jobs at a time
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))

from toolchain import cuda_architectures, cuda_mode, native_mode, not_buildable  # noqa: E402 - lies in tools

PACKAGE = Path("ceat_fast")
LIBRARIES = PACKAGE / "_lib"


class CMakeBuild(build_ext):
    """One CMake build for all libraries, put into `ceat_fast/_lib`."""

    def run(self) -> None:
        output = (ROOT if self.inplace else Path(self.build_lib).resolve()) / LIBRARIES
        output.mkdir(parents=True, exist_ok=True)
        (output / "skipped.txt").unlink(missing_ok=True)
        # In place, a folder that lasts: setuptools' own is new for every editable install.
        build = (ROOT / "build" if self.inplace else Path(self.build_temp).resolve()) / "cmake"
        torch_dir = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
        subprocess.run(
            [
                *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
                f"-DTORCH_DIR={torch_dir}",
                f"-DCEAT_FAST_TORCH_VERSION={importlib.metadata.version('torch')}",
                f"-DCEAT_FAST_OUTPUT={output}",
                f"-DCEAT_FAST_CUDA={cuda_mode()}",
                f"-DCEAT_FAST_CUDA_ARCHS={cuda_architectures(os.environ.get('TORCH_CUDA_ARCH_LIST', ''))}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11_cmake_dir()}",
            ],
            check=True,
        )
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)

    def get_outputs(self) -> list[str]:
        base = ROOT if self.inplace else Path(self.build_lib)
        return [str(path) for path in sorted((base / LIBRARIES).glob("*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildPython(build_py):
    """Leaves a note for `ceat_fast.build_info()` where nothing is compiled."""

    def run(self) -> None:
        super().run()
        if reason is not None:
            target = (ROOT if self.editable_mode else Path(self.build_lib)) / LIBRARIES
            target.mkdir(parents=True, exist_ok=True)
            (target / "skipped.txt").write_text(reason + "\n")


def pybind11_cmake_dir() -> str:
    import pybind11

    return pybind11.get_cmake_dir()


reason = not_buildable()
if reason is not None:
    if native_mode() == "on":
        sys.exit(f"CEAT_FAST_NATIVE=on, but the native parts are {reason}")
    print(f"ceat_fast: native parts {reason}; plain torch and Triton serve instead", file=sys.stderr)

setup(
    ext_modules=[] if reason is not None else [Extension("ceat_fast._lib._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
)
