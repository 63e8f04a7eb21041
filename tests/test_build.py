"""What the build decides before it compiles, and what it must not let into the kernels."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def toolchain(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("toolchain", repository / "tools" / "toolchain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arch_list", "expected"),
    [
        ("", ""),
        ("9.0", "90-real"),
        ("8.0;9.0a+PTX", "80-real;90a"),
        ("8.0 12.0+PTX", "80-real;120"),
        ("10.0f, 12.0", "100f-real;120-real"),
    ],
)
def test_arch_list_becomes_cmake_architectures(toolchain: ModuleType, arch_list: str, expected: str) -> None:
    assert toolchain.cuda_architectures(arch_list) == expected


@pytest.mark.parametrize("arch_list", ["Hopper", "9", "9.0+ptx", "sm_90"])
def test_unreadable_arch_list_is_refused(toolchain: ModuleType, arch_list: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(f"TORCH_CUDA_ARCH_LIST: cannot read {arch_list!r}")):
        toolchain.cuda_architectures(arch_list)


def test_switched_off(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CEAT_FAST_NATIVE", "off")
    assert toolchain.no_compiler() == "not built: CEAT_FAST_NATIVE=off"


def test_no_compiler(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CEAT_FAST_NATIVE", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.no_compiler() == "not built: no C++ compiler found (c++, g++, clang++)"
    monkeypatch.setenv("CXX", "icpx -O2")
    assert toolchain.no_compiler() == "not built: no C++ compiler found (icpx)"


@pytest.mark.parametrize("variable", ["CEAT_FAST_NATIVE", "CEAT_FAST_CUDA"])
def test_unknown_mode_is_refused(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "yes")
    mode = toolchain.native_mode if variable == "CEAT_FAST_NATIVE" else toolchain.cuda_mode
    with pytest.raises(SystemExit, match=f"{variable} must be auto, on or off, got 'yes'"):
        mode()


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="needs g++ and nm")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs an x86 processor's compiler")
@pytest.mark.parametrize("source", ["kernels", "winograd", "direct"])
def test_kernels_share_no_code_between_instruction_sets(repository: Path, tmp_path: Path, source: str) -> None:
    """The linker keeps one copy of a weak symbol: never the AVX copy of something that the portable kernels call."""
    kernels = tmp_path / "kernels.o"
    flags = ["-std=c++17", "-O3", "-fPIC", "-march=x86-64-v4", "-mavx512bf16", "-DCEAT_ISA=avx512_bf16"]
    command = ["g++", *flags, "-fvisibility=hidden", "-c", "-o", str(kernels)]
    subprocess.run([*command, str(repository / "csrc" / "cpu" / f"{source}.cpp")], check=True)
    listing = subprocess.run(["nm", "-C", str(kernels)], capture_output=True, text=True, check=True).stdout
    weak = [line for line in listing.splitlines() if re.search(r" [WVu] ", line) and "personality" not in line]
    assert weak or source != "kernels", "the templates of the kernels are weak symbols"
    assert [line for line in weak if "::avx512_bf16::" not in line] == []
