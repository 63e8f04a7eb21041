"""Every kernel of the package once, in all its variants, on small problems: what compute-sanitizer is to watch.

compute-sanitizer --tool memcheck python bench/every_kernel.py [native] [triton]
"""

from __future__ import annotations

import itertools
import sys

import torch

from ceat_fast.ops import dispatch, member_training
from ceat_fast.ops.chain import Chain, Link
from ceat_fast.ops.convolution import MemberWeights
from ceat_fast.ops.member_training import Norm
from ceat_fast.ops.reference import CeatSettings

# Every way to hold a row, with packs and with single classes; the first two for Triton.
LOSS_SIZES = ((3, 33, 10), (3, 9, 100), (2, 5, 7), (3, 9, 77), (2, 3, 1000), (2, 3, 333), (2, 2, 3000), (40, 3, 5))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
IMAGES = ((8, 8), (16, 16), (8, 32))


def losses(impl: str) -> None:
    # Each variant of a Triton kernel is compiled, which takes its time here.
    dtypes, sizes = (DTYPES, LOSS_SIZES) if impl == "native" else (DTYPES[:1], LOSS_SIZES[:2])
    for dtype, (members, batch, classes), reduction in itertools.product(dtypes, sizes, (0, 1)):
        adv, nat = (torch.randn(members, batch, classes, device="cuda").to(dtype) for _ in range(2))
        target = torch.randint(0, classes, (batch,), device="cuda")
        settings = CeatSettings(1.0, 1.0, 5.0, 1.0, 5.0, float("inf"), 0, reduction, False)
        module = dispatch.module(dispatch.backend_name(impl, "cuda"))
        _, adv_grad, nat_grad, _ = module.ceat_loss(adv, nat, target, settings, True, True)
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        module.scale_gradients(adv_grad, nat_grad, torch.rand(members, device="cuda", dtype=kind))
        module.ensemble_cross_entropy(adv, target, reduction, True)


def steps(impl: str) -> None:
    for dtype, shape in itertools.product((torch.float32, torch.float64), ((3, 5), (2, 3, 32, 32))):
        x, grad = (torch.rand(shape, device="cuda", dtype=dtype) for _ in range(2))
        dispatch.pgd_step(x, grad, x, 0.01, 0.03, impl=impl)


def convolutions(impl: str) -> None:
    dtype = torch.bfloat16 if impl == "native" else torch.float32
    widths = (16, 32, 64) if impl == "native" else (16,)
    for channels, filters, stride, point in itertools.product(widths, widths, (1, 2), (False, True)):
        weight = torch.randn(2, filters, 3, 3, channels, device="cuda", dtype=dtype)
        kernel = "cuda" if impl == "native" else "triton"
        weights = MemberWeights(weight, weight.new_ones(2, filters), stride, point, kernel=kernel)
        x = torch.randn(2, 3, 7, 9, channels, device="cuda", dtype=dtype)
        out = weights.convolve(x, None, relu=True)
        weights.convolve(x, out, relu=True)
        weights.input_gradient(out, 7, 9, x, x)


def chains() -> None:
    for channels, side, count in itertools.product((16, 32, 64), IMAGES, (1, 4)):
        size = 2, 5, *side, channels
        x, other = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        links = []
        for number in range(count):
            weight = torch.randn(2, channels, 3, 3, channels, device="cuda", dtype=torch.bfloat16)
            bias = torch.randn(2, channels, device="cuda", dtype=torch.bfloat16)
            links.append(Link(MemberWeights(weight, bias, 1), number % 2 == 0, relu=number != 2))
        chain = Chain(links)
        out, masks = chain.run(x, other, masked=True)
        chain.input_gradient(out, masks, x)


def training() -> None:
    for channels, side in itertools.product((16, 64), ((5, 7), (8, 8))):
        x = torch.randn(2, 3, *side, channels, device="cuda", dtype=torch.bfloat16)
        norm = Norm(*(torch.rand(2, channels, device="cuda") for _ in range(4)), 0.1, 1e-5)
        out, saved = member_training.normalise(x, norm, x, relu=True)
        member_training.norm_gradients(out, out, x, saved, norm.weight, residual=True, relu=True)
        member_training.weight_gradient(x, out, 1, point=False, channels=channels)


def main() -> None:
    impls = sys.argv[1:] or ["native", "triton"]
    for impl in impls:
        losses(impl)
        steps(impl)
        convolutions(impl)
    if "native" in impls:
        chains()
    if "triton" in impls:
        training()
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
