# Kernel arguments are pointers and numbers of triton, which has no types to offer.
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"
"""Triton kernel of the member-batched 3x3 convolution. Importing this file imports triton.

An implicit matrix product: rows are output pixels of one member (all samples one after the other), columns its filters,
and the nine taps are nine products of (BLOCK, CHANNELS) with (CHANNELS, FILTERS), accumulated in fp32. All members of a
layer are one launch. The gradient for the input is the same sum with the taps looked up the other way round:

    out[r, q] = sum over u, v of x[s r + u - 1, s q + v - 1] W[u, v]
    dx[r, q]  = sum over u, v of g[(r + 1 - u) / s, (q + 1 - v) / s] W[u, v]^T       where s divides both
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def member_convolution_kernel(
    x,  # (M, B, height, width, CHANNELS), contiguous
    weight,
    bias,  # (M, FILTERS)
    residual,  # like out
    gate,  # like out: where it is not positive, out is 0
    out,  # (M, B, out_height, out_width, FILTERS), contiguous
    samples,
    height,
    width,
    out_height,
    out_width,
    weight_member,
    weight_tap,
    weight_channel,
    weight_filter,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    member = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pixels = samples * out_height * out_width
    valid = pixel < pixels
    sample = pixel // (out_height * out_width)
    row = pixel // out_width % out_height
    column = pixel % out_width
    channel = tl.arange(0, CHANNELS)
    filter = tl.arange(0, FILTERS)
    sums = tl.zeros((BLOCK, FILTERS), tl.float32)
    for tap in range(9):  # unrolled, fp32 with 64 channels would compile for minutes, and spill
        if TRANSPOSED:
            r, q = row + 1 - tap // 3, column + 1 - tap % 3
            inside = valid & (r >= 0) & (q >= 0) & (r % STRIDE == 0) & (q % STRIDE == 0)
            r, q = r // STRIDE, q // STRIDE
        else:
            r, q = row * STRIDE + tap // 3 - 1, column * STRIDE + tap % 3 - 1
            inside = valid & (r >= 0) & (q >= 0)
        inside = inside & (r < height) & (q < width)
        place = ((member * samples + sample) * height + r) * width + q
        offsets = place[:, None] * CHANNELS + channel[None, :]
        values = tl.load(x + offsets, mask=inside[:, None], other=0.0)
        taps = weight + member * weight_member + tap * weight_tap
        tile = tl.load(taps + channel[:, None] * weight_channel + filter[None, :] * weight_filter)
        sums = tl.dot(values.to(tile.dtype), tile, sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias + member * FILTERS + filter).to(tl.float32)[None, :]
    offsets = (member * pixels + pixel)[:, None] * FILTERS + filter[None, :]
    if HAS_RESIDUAL:
        sums += tl.load(residual + offsets, mask=valid[:, None], other=0.0).to(tl.float32)
    if RELU:
        sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if HAS_GATE:
        sums = tl.where(tl.load(gate + offsets, mask=valid[:, None], other=0.0) <= 0.0, 0.0, sums)
    tl.store(out + offsets, sums.to(out.dtype.element_ty), mask=valid[:, None])
