# Kernel arguments are pointers and numbers of triton, which has no types to offer.
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"
"""Triton kernels for training members as one network. Importing this file imports triton.

Activations are (M, rows, C), contiguous: a row is a pixel of a sample, and C a power of two. Sums over rows are made in
parts, by as many programs, and added up by whoever needs them, always in the same order: equal inputs give equal bits.

    y^ = (y - mean) / sqrt(var + eps)           out = max(0, gamma y^ + beta + residual)
    g = dL/dout where out > 0                   dgamma = sum g y^,  dbeta = sum g
    dy = gamma / sqrt(var + eps) (g - mean(g) - y^ mean(g y^))
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def statistics_kernel(y, partial, rows, chunk, C: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of y - pivot and of its square over a part of the rows; the pivot is row 0, near enough to the mean."""
    part, member = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, C)
    pivot = tl.load(y + member * rows * C + channel).to(tl.float32)
    first = part.to(tl.int64) * chunk
    count = tl.minimum(rows - first, chunk)
    base = y + (member * rows + first) * C
    sums = tl.zeros((BLOCK, C), tl.float32)
    squares = tl.zeros((BLOCK, C), tl.float32)
    for start in range(0, count, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = (row < count)[:, None]
        values = tl.load(base + row[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, values - pivot[None, :], 0.0)
        sums += difference
        squares += difference * difference
    to = partial + (member * tl.num_programs(0) + part) * 2 * C
    tl.store(to + channel, tl.sum(sums, 0))
    tl.store(to + C + channel, tl.sum(squares, 0))


@triton.jit
def _total(partial, member, parts, which, C: tl.constexpr, PARTS: tl.constexpr):
    """The sum of all parts of sum `which` of 2: (C,)."""
    part = tl.arange(0, PARTS)
    places = partial + ((member * parts + part) * 2 + which)[:, None] * C + tl.arange(0, C)[None, :]
    return tl.sum(tl.load(places, mask=(part < parts)[:, None], other=0.0), 0)


@triton.jit
def normalise_kernel(
    y,
    partial,
    weight,  # (M, C) like bias and the running statistics
    bias,
    residual,
    out,
    saved,  # (M, 2, C): mean and 1 / sqrt(var + eps)
    running_mean,
    running_var,
    rows,
    chunk,
    parts,
    momentum,
    eps,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):
    program, member = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, C)
    of_member = member * C + channel
    shift = _total(partial, member, parts, 0, C, PARTS) / rows
    variance = _total(partial, member, parts, 1, C, PARTS) / rows - shift * shift
    variance = tl.where(variance < 0.0, 0.0, variance)
    mean = tl.load(y + member * rows * C + channel).to(tl.float32) + shift
    scale = 1.0 / tl.sqrt(variance + eps)
    if program == 0:
        tl.store(saved + member * 2 * C + channel, mean)
        tl.store(saved + member * 2 * C + C + channel, scale)
        before = tl.load(running_mean + of_member)
        tl.store(running_mean + of_member, before + momentum * (mean - before))
        before = tl.load(running_var + of_member)
        unbiased = variance * (rows / (rows - 1.0))
        tl.store(running_var + of_member, before + momentum * (unbiased - before))
    scale = scale * tl.load(weight + of_member)
    offset = tl.load(bias + of_member) - mean * scale
    first = program.to(tl.int64) * chunk
    count = tl.minimum(rows - first, chunk)
    base = (member * rows + first) * C
    for start in range(0, count, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = (row < count)[:, None]
        places = base + row[:, None] * C + channel[None, :]
        values = tl.load(y + places, mask=inside, other=0.0).to(tl.float32) * scale[None, :] + offset[None, :]
        if HAS_RESIDUAL:
            values += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            values = tl.where(values < 0.0, 0.0, values)  # NaN stays NaN
        tl.store(out + places, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(grad, out, places, inside, RELU: tl.constexpr):
    values = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        values = tl.where(tl.load(out + places, mask=inside, other=0.0) <= 0.0, 0.0, values)
    return values


@triton.jit
def gradient_sums_kernel(
    grad, out, y, saved, partial, rows, chunk, C: tl.constexpr, BLOCK: tl.constexpr, RELU: tl.constexpr
):
    """Sums of g and of g y^ over a part of the rows."""
    part, member = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, C)
    mean = tl.load(saved + member * 2 * C + channel)
    scale = tl.load(saved + member * 2 * C + C + channel)
    first = part.to(tl.int64) * chunk
    count = tl.minimum(rows - first, chunk)
    base = (member * rows + first) * C
    sums = tl.zeros((BLOCK, C), tl.float32)
    products = tl.zeros((BLOCK, C), tl.float32)
    for start in range(0, count, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = (row < count)[:, None]
        places = base + row[:, None] * C + channel[None, :]
        values = _gradient(grad, out, places, inside, RELU)
        centred = tl.load(y + places, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        sums += values
        products += values * centred
    to = partial + (member * tl.num_programs(0) + part) * 2 * C
    tl.store(to + channel, tl.sum(sums, 0))
    tl.store(to + C + channel, tl.sum(products, 0) * scale)


@triton.jit
def norm_gradient_kernel(
    grad,
    out,
    y,
    saved,
    partial,
    weight,
    grad_y,
    grad_residual,
    grad_weight,  # (M, C)
    grad_bias,
    rows,
    chunk,
    parts,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):
    program, member = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, C)
    of_member = member * C + channel
    total = _total(partial, member, parts, 0, C, PARTS)
    product = _total(partial, member, parts, 1, C, PARTS)
    if program == 0:
        tl.store(grad_bias + of_member, total)
        tl.store(grad_weight + of_member, product)
    mean = tl.load(saved + member * 2 * C + channel)
    scale = tl.load(saved + member * 2 * C + C + channel)
    slope = product / rows * scale
    level = total / rows
    factor = scale * tl.load(weight + of_member)
    first = program.to(tl.int64) * chunk
    count = tl.minimum(rows - first, chunk)
    base = (member * rows + first) * C
    for start in range(0, count, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = (row < count)[:, None]
        places = base + row[:, None] * C + channel[None, :]
        values = _gradient(grad, out, places, inside, RELU)
        if HAS_RESIDUAL:
            tl.store(grad_residual + places, values.to(grad_residual.dtype.element_ty), mask=inside)
        centred = tl.load(y + places, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        values = factor[None, :] * (values - level[None, :] - centred * slope[None, :])
        tl.store(grad_y + places, values.to(grad_y.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradient_kernel(
    x,  # (M, samples, height, width, C)
    grad,  # (M, samples, out_height, out_width, F)
    partial,  # (M, parts, taps, C, F)
    samples,
    height,
    width,
    out_height,
    out_width,
    chunk,
    C: tl.constexpr,
    F: tl.constexpr,
    STRIDE: tl.constexpr,
    POINT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sum over output pixels of x[pixel at tap, c] grad[pixel, f], for a row of taps and a part of the pixels."""
    part, member = tl.program_id(0), tl.program_id(2).to(tl.int64)
    u = 1 if POINT else tl.program_id(1)
    channel, filter = tl.arange(0, C), tl.arange(0, F)
    pixels = samples * out_height * out_width
    x += member * samples * height * width * C
    grad += member * pixels * F
    left = tl.zeros((C, F), tl.float32)
    middle = tl.zeros((C, F), tl.float32)
    right = tl.zeros((C, F), tl.float32)
    end = tl.minimum((part + 1) * chunk, pixels)
    for start in range(part * chunk, end, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        line = pixel // out_width
        sample = line // out_height
        row = (line - sample * out_height) * STRIDE + u - 1
        column = (pixel - line * out_width) * STRIDE
        inside = (pixel < end) & (row >= 0) & (row < height)
        place = ((sample.to(tl.int64) * height + row) * width + column)[:, None] * C + channel[None, :]
        outer = tl.load(
            grad + pixel.to(tl.int64)[:, None] * F + filter[None, :], mask=(pixel < end)[:, None], other=0.0
        )
        values = tl.load(x + place, mask=(inside & (column < width))[:, None], other=0.0)
        middle = tl.dot(tl.trans(values), outer, middle, input_precision="ieee")
        if not POINT:
            values = tl.load(x + place - C, mask=(inside & (column >= 1))[:, None], other=0.0)
            left = tl.dot(tl.trans(values), outer, left, input_precision="ieee")
            values = tl.load(x + place + C, mask=(inside & (column + 1 < width))[:, None], other=0.0)
            right = tl.dot(tl.trans(values), outer, right, input_precision="ieee")
    taps = 1 if POINT else 9
    tap = 0 if POINT else 3 * tl.program_id(1)
    to = partial + ((member * tl.num_programs(0) + part) * taps + tap) * C * F
    to += channel[:, None] * F + filter[None, :]
    if POINT:
        tl.store(to, middle)
    else:
        tl.store(to, left)
        tl.store(to + C * F, middle)
        tl.store(to + 2 * C * F, right)
