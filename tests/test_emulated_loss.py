"""The CUDA kernels of the losses, emulated on the host, against the specification in float64."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from emulated import build_emulator, emulate
from torch import Tensor

from ceat_fast.ops import reference
from ceat_fast.ops.reference import CeatSettings

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # as csrc/cuda/launch.h numbers them
# One thread, eight, a warp per row; rows in memory; many members; packs and single elements of each.
SHAPES = (
    (3, 5, 10),
    (2, 70, 7),
    (1, 4, 1),
    (4, 3, 100),
    (3, 2, 77),
    (3, 2, 1000),
    (2, 2, 333),
    (2, 2, 1500),
    (40, 2, 6),
)
SHAPES_OF_LANES = (*SHAPES, (300, 2, 9), (9, 1, 130))
ROWS = ((3, 4, 10), (3, 4, 50), (3, 4, 300), (3, 4, 1100))
SETTINGS = CeatSettings(1.0, 1.0, 5.0, 1.0, 5.0, math.inf, 0, 1, False)


class Found(NamedTuple):
    loss: Tensor
    gradients: list[Tensor]
    parts: Tensor


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_emulator("loss", tmp_path_factory.mktemp("simt"))


def logits_of(shape: tuple[int, int, int], dtype: torch.dtype, scale: float = 3.0, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [(scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(count)]


def labels_of(shape: tuple[int, int, int]) -> Tensor:
    return torch.randint(0, shape[2], shape[1:2], generator=torch.Generator().manual_seed(1))


def run(
    program: Path,
    logits: list[Tensor],
    target: Tensor,
    settings: CeatSettings = SETTINGS,
    pad: int = 0,
    offset: int = 0,
) -> Found:
    """Value, gradients and parts of the kernel; rows lie `pad` elements apart and begin at `offset`."""
    members, samples, classes = shape = logits[0].shape
    dtype = logits[0].dtype
    wide, of_loss = torch.promote_types(dtype, torch.float32), torch.float32 if dtype == torch.float16 else dtype
    storages = []
    for tensor in logits:
        storage = torch.full((members, samples, classes + pad), math.nan, dtype=dtype)
        storage[..., offset : offset + classes] = tensor
        storages.append(raw(storage))
    strides = samples * (classes + pad), classes + pad
    of_ensemble = len(logits) == 1
    numbers = [of_ensemble, DTYPES.index(dtype), *shape, *strides, offset, members * strides[0]]
    numbers += [settings.reduction, settings.pair_reduction, settings.detach_nat]
    scale = 1 / samples if reference.REDUCTIONS[settings.reduction] == "mean" else 1.0
    scalars = torch.tensor([*settings[:6], scale], dtype=torch.float64)
    data = bytearray(emulate(program, numbers, [raw(scalars), *storages, raw(target)]))

    def take(kind: torch.dtype, *size: int) -> Tensor:
        count = math.prod(size)
        taken = torch.empty(size, dtype=kind)
        taken.view(-1).view(torch.uint8)[:] = torch.tensor(list(data[: count * kind.itemsize]), dtype=torch.uint8)
        del data[: count * kind.itemsize]
        return taken

    rows = (1,) if of_ensemble else (members,)
    loss = take(wide, *rows, *(() if settings.reduction else (samples,)))
    gradients = [take(of_loss, *shape) for _ in logits]
    return Found(loss, gradients, take(wide, *(0,) if of_ensemble else (7, members, samples)))


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def right(logits: list[Tensor], target: Tensor, settings: CeatSettings = SETTINGS) -> Found:
    leaves = [tensor.double().requires_grad_() for tensor in logits]
    if len(leaves) == 1:
        loss, parts = reference.ensemble_cross_entropy(leaves[0], target, settings.reduction).view(1, -1), ()
        loss = loss if settings.reduction == 0 else loss[:, 0]
    else:
        loss, parts = reference.ceat_loss(leaves[0], leaves[1], target, settings)
    gradients = list(torch.autograd.grad(loss.sum(), leaves))
    return Found(loss.detach(), gradients, torch.stack(parts) if parts else torch.empty(0, dtype=torch.float64))


def assert_close(found: Found, expected: Found, dtype: torch.dtype, single: float = 2e-6) -> None:
    exact = 1e-12 if dtype == torch.float64 else single
    rounding = {torch.bfloat16: 2**-8, torch.float16: 1e-5}.get(dtype, exact)  # of gradients; fp16's are in fp32
    for got, wanted, tolerance in (
        (found.loss, expected.loss, exact),
        (found.parts, expected.parts, exact),
        *((got, wanted, rounding) for got, wanted in zip(found.gradients, expected.gradients, strict=True)),
    ):
        # What is small beside the largest gradient may cancel to it.
        size = wanted.abs().max() if wanted.numel() else 0.0
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=exact * float(size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES_OF_LANES, ids=str)
def test_loss_is_the_specification(emulator: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    logits, target = logits_of(shape, dtype), labels_of(shape)
    assert_close(run(emulator, logits, target), right(logits, target), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES_OF_LANES, ids=str)
def test_ensemble_is_the_specification(emulator: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    logits, target = logits_of(shape, dtype, count=1), labels_of(shape)
    assert_close(run(emulator, logits, target), right(logits, target), dtype)


@pytest.mark.parametrize(
    ("pair_reduction", "reduction", "detach"), list(itertools.product((0, 1, 2), (0, 1, 2), (False, True)))
)
def test_settings(emulator: Path, pair_reduction: int, reduction: int, detach: bool) -> None:
    logits, target = logits_of((4, 3, 10), torch.float64), labels_of((4, 3, 10))
    settings = CeatSettings(0.5, 2.0, 0.7, 1.3, 0.9, 1.5, pair_reduction, reduction, detach)
    assert_close(run(emulator, logits, target, settings), right(logits, target, settings), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pad", "offset"), [(4, 0), (4, 4), (1, 0), (3, 1)])
@pytest.mark.parametrize("shape", [(3, 2, 10), (3, 2, 40), (2, 2, 200), (2, 1, 1200)], ids=str)
def test_rows_need_not_be_aligned(
    emulator: Path, shape: tuple[int, int, int], dtype: torch.dtype, pad: int, offset: int
) -> None:
    logits, target = logits_of(shape, dtype), labels_of(shape)
    assert_close(run(emulator, logits, target, SETTINGS, pad, offset), right(logits, target), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_infinities_nan_and_labels_outside(emulator: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """A class may be impossible. What is wrong with a sample stays with it; one without a label has zero gradients."""
    logits, target = logits_of(shape, dtype), labels_of(shape)
    impossible = (target[0] + 1) % shape[2]
    for tensor in logits:
        tensor[:, 0, impossible] = -math.inf
    logits[0][1, 1, 3] = math.nan
    logits[1][0, 2, 2] = math.inf
    target[3] = shape[2]
    settings = SETTINGS._replace(reduction=0)
    found = run(emulator, logits, target, settings)
    expected = right([tensor[:, :1] for tensor in logits], target[:1], settings)
    first = Found(found.loss[:, :1], [tensor[:, :1] for tensor in found.gradients], found.parts[..., :1])
    assert_close(first, expected, dtype)
    assert found.loss[1, 1].isnan()
    assert found.loss[0, 2].isnan()
    assert found.loss[:, 3].isnan().all()
    assert all(tensor[:, 3].eq(0).all() for tensor in found.gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_sure_rows_keep_their_digits(emulator: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Losses of 1e-10 and gradients of 1e-20 are nearly as exact as others."""
    logits, target = logits_of(shape, dtype, 0.1), labels_of(shape)
    for tensor in logits:
        tensor.scatter_(2, target.expand(shape[0], -1).unsqueeze(2), 25.0)
    assert_close(run(emulator, logits, target), right(logits, target), dtype, single=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exponentials_far_below(emulator: Path, dtype: torch.dtype) -> None:
    """Small probabilities to the digits that the rounding of their logits leaves."""
    z = torch.linspace(-80, 0, 97, dtype=torch.float64).to(dtype)
    logits, target = [z.expand(1, 1, -1).clone() for _ in range(2)], torch.tensor([96])
    settings = SETTINGS._replace(nat_coefficient=0.0, adv_coefficient=0.0)
    gradient = run(emulator, logits, target, settings).gradients[0]
    expected = right(logits, target, settings).gradients[0]
    rounding = 2e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(gradient.double(), expected, rtol=rounding, atol=0)
