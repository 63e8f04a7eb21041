"""CUDA kernels emulated on the host: programs of tests/simt that read a problem and write its outputs."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

_SOURCES = Path(__file__).parent / "simt"
_SANITIZERS = ("-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all")


def build_emulator(name: str, folder: Path) -> Path:
    """The program of that name; without a compiler the test is skipped."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = folder / name
    source = _SOURCES / f"{name}.cpp"
    command = [compiler, "-std=c++17", "-O1", "-Wno-unknown-pragmas", f"-I{_SOURCES}", "-o", program, source]
    # Where the compiler has them: accesses outside of a tensor, and packs that are not aligned, which a GPU refuses.
    watched = subprocess.run([*command, *_SANITIZERS], capture_output=True, check=False)
    if watched.returncode != 0:
        subprocess.run(command, check=True)
    return program


def emulate(program: Path, numbers: Sequence[int], tensors: Sequence[Tensor | bytes | None]) -> bytes:
    """What the program writes for a problem; bf16 tensors, or bytes as they are."""
    parts = [numpy.array([int(number) for number in numbers], numpy.int32).tobytes()]
    parts += [_raw(tensor) for tensor in tensors if tensor is not None]
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}  # fibers have stacks
    done = subprocess.run([program], input=b"".join(parts), capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def bf16_tensor(data: bytes, shape: Sequence[int]) -> Tensor:
    """The tensor of that shape at the start of the data."""
    return torch.frombuffer(bytearray(data[: 2 * math.prod(shape)]), dtype=torch.bfloat16).view(shape)


def _raw(tensor: Tensor | bytes) -> bytes:
    if isinstance(tensor, bytes):
        return tensor
    assert tensor.dtype == torch.bfloat16
    return tensor.contiguous().view(torch.int16).numpy().tobytes()
