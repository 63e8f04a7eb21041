"""The CUDA kernels as far as a machine without a GPU can judge them: they compile, keep to registers, and are laid out
as planned.

Compiled for one architecture with the flags of cmake/cuda.cmake, warnings being errors.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH")

CUDA_SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
TORCH_HEADERS = Path(torch.__file__).parent / "include"
DEVICE_FLAGS = ["-std=c++17", "-O3", "-gencode", "arch=compute_90,code=sm_90"]
HOST_CALL_IS_AN_ERROR = "-diag-error=20011"

# Four element types times four kinds of rows (thread, sub-warp, warp, streamed), all but a warp's with packs and with
# single classes; a warp's again for crowded blocks, but for fp64; PGD: two image types times four gradient types;
# scaling: four types times three pack widths; one adding kernel per loss file and compute type; convolutions: three
# numbers of channels times three of filters times three directions.
KERNELS = {
    "ceat_loss_kernel": 31,
    "ensemble_kernel": 28,
    "pgd_step_kernel": 8,
    "scale_gradients_kernel": 12,
    "sum_rows_kernel": 4,
    "convolution_kernel": 27,
}


# Blocks of a warp's rows that share a multiprocessor have 128 registers for a thread: a few numbers wait in memory.
CROWDED, CROWDED_BYTES = "Li128ELi4E", 32


class Kernel(NamedTuple):
    name: str
    stack_bytes: int
    spill_stores: int
    spill_loads: int

    @property
    def allowed(self) -> int:
        """Bytes of spilled registers."""
        return CROWDED_BYTES if CROWDED in self.name else 0


def nvcc(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [str(NVCC), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert not check or result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return result


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """What ptxas says about every kernel of csrc/cuda."""
    objects = tmp_path_factory.mktemp("cuda_objects")

    def compile_file(source: Path) -> str:
        flags = [*DEVICE_FLAGS, HOST_CALL_IS_AN_ERROR, "--Werror", "all-warnings", "-Xptxas", "-v"]
        return nvcc("-c", source, *flags, "-o", objects / f"{source.stem}.o").stderr

    with ThreadPoolExecutor(2) as pool:
        log = "".join(pool.map(compile_file, sorted(CUDA_SOURCES.glob("*.cu"))))
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_90'\n.*\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    return [Kernel(name, *map(int, numbers)) for name, *numbers in re.findall(pattern, log)]


def test_every_instance_is_compiled(kernels: list[Kernel]):
    assert Counter(name for kernel in kernels for name in KERNELS if name in kernel.name) == KERNELS


def test_no_kernel_spills(kernels: list[Kernel]):
    assert [kernel for kernel in kernels if max(kernel.spill_stores, kernel.spill_loads) > kernel.allowed] == []


def test_rows_stay_in_registers(kernels: list[Kernel]):
    # An index that the compiler cannot resolve moves a row to local memory without any spill: a stack frame shows it.
    assert [kernel for kernel in kernels if "ResidentRow" in kernel.name and kernel.stack_bytes > kernel.allowed] == []


def test_calling_host_code_from_device_code_is_an_error(tmp_path: Path):
    source = tmp_path / "host_call.cu"
    source.write_text(
        "double host_only(double x);\n"
        "template <class T> __host__ __device__ T twice(T x) { return 2 * host_only(x); }\n"
        "__global__ void kernel(double* x) { *x = twice(*x); }\n"
    )
    compile_only = ["-c", source, *DEVICE_FLAGS, "-o", tmp_path / "host_call.o"]
    assert nvcc(*compile_only).returncode == 0
    refused = nvcc(*compile_only, HOST_CALL_IS_AN_ERROR, check=False)
    assert refused.returncode != 0
    assert "calling a __host__ function" in refused.stderr


def test_ops_compile_against_the_stable_abi(tmp_path: Path):
    definitions = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA"]
    warnings = ["-Xcompiler", "-Wall,-Wextra,-Werror"]
    include = ["-isystem", TORCH_HEADERS]
    nvcc("-c", CUDA_SOURCES / "ops.cpp", "-std=c++17", *definitions, *warnings, *include, "-o", tmp_path / "ops.o")


PLAN_PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "plan.h"
int main(int, char** argv) {
  const ceat::cuda::Shape shape{std::atoi(argv[1]), std::atoll(argv[2]), std::atoi(argv[3])};
  const auto plan = ceat::cuda::make_plan(shape, std::atoi(argv[4]) != 0);
  std::printf("%d %d %d %d %lld", int(plan.kind), plan.lanes, plan.samples, plan.threads, (long long)plan.blocks);
}
"""
THREAD, SUB_WARP, WARP, STREAMED = range(4)


@pytest.fixture(scope="session")
def plan_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(PLAN_PROGRAM)
    nvcc(folder / "plan.cpp", "-std=c++17", "-I", CUDA_SOURCES, "-o", folder / "plan")
    return folder / "plan"


@pytest.mark.parametrize(
    ("shape", "is_double", "plan"),
    [
        # (M, B, K) -> (kind of row, lanes, samples per block, threads per block, blocks)
        pytest.param((3, 128, 10), False, (THREAD, 1, 128, 384, 1), id="the paper's batch: one launch"),
        pytest.param((3, 128, 10), True, (THREAD, 1, 128, 384, 1), id="also in double"),
        pytest.param((3, 256, 10), False, (THREAD, 1, 256, 768, 1), id="the largest single block"),
        pytest.param((3, 257, 10), False, (THREAD, 1, 85, 256, 4), id="one sample more"),
        pytest.param((3, 256, 10), True, (THREAD, 1, 85, 256, 4), id="doubles need more registers"),
        pytest.param((1, 1, 2), False, (THREAD, 1, 1, 32, 1), id="whole warps only"),
        pytest.param((3, 128, 100), False, (SUB_WARP, 8, 10, 256, 13), id="CIFAR-100"),
        pytest.param((3, 1024, 1000), False, (WARP, 32, 1, 96, 1024), id="ImageNet"),
        pytest.param((3, 8, 1025), False, (STREAMED, 32, 2, 192, 4), id="rows beyond the registers"),
        pytest.param((9, 64, 200), False, (STREAMED, 32, 1, 288, 64), id="members beyond 256 threads"),
        pytest.param((512, 4, 100), True, (STREAMED, 1, 1, 512, 4), id="the most members"),
        pytest.param((3, 0, 10), False, (THREAD, 1, 1, 32, 0), id="empty batch"),
    ],
)
def test_plan(plan_program: Path, shape: tuple[int, int, int], is_double: bool, plan: tuple[int, ...]):
    arguments = [str(number) for number in (*shape, int(is_double))]
    printed = subprocess.run([plan_program, *arguments], capture_output=True, text=True, check=True).stdout
    assert tuple(map(int, printed.split())) == plan
