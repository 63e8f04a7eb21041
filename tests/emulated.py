"""CUDA kernels emulated on the host: programs of tests/simt that read a problem and write its outputs."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

_SOURCES = Path(__file__).parent / "simt"


def build_emulator(name: str, folder: Path) -> Path:
    """The program of that name; without a compiler the test is skipped."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = folder / name
    source = _SOURCES / f"{name}.cpp"
    command = [compiler, "-std=c++17", "-O1", "-Wno-unknown-pragmas", f"-I{_SOURCES}", "-o", program, source]
    subprocess.run(command, check=True)
    return program


def emulate(program: Path, numbers: Sequence[int], tensors: Sequence[Tensor | bytes | None]) -> bytes:
    """What the program writes for a problem; bf16 tensors, or bytes as they are."""
    parts = [numpy.array([int(number) for number in numbers], numpy.int32).tobytes()]
    parts += [_raw(tensor) for tensor in tensors if tensor is not None]
    done = subprocess.run([program], input=b"".join(parts), capture_output=True, check=False)
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
