"""Instance norm, residual and LeakyReLU on the GPU.

Memory is the bottleneck: one pass reads a volume for its statistics, or for the sums that its gradient needs, and a
second one reads it again and writes the result. Each program gets a part of the voxels, consecutive rows; what programs
find is joined in the order of the parts, so results repeat bit by bit. A small volume, for which launches take longer
than memory, is done in one launch, with a program for every few channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import Call
from .tiles import INTERPRETED, multiprocessors
from .windows import device_of


def declines(call: Call) -> str | None:
    return None


ELEMENTS = 512 if INTERPRETED else 4096
"""Elements of a tile: voxels times channels."""

WARPS = 8
MAX_CHANNELS = 128
"""Most channels of a tile. Wider volumes are cut into blocks of so many channels."""

SMALL_VOXELS = 64 if INTERPRETED else 4096
"""Volumes up to this size are done in one launch."""

SMALL_CHANNELS = 16
"""Channels of a program for a small volume: 32 bytes in 16 bits, the least that memory moves."""

PROGRAMS = 6
"""Programs that each multiprocessor should get; voxels are divided accordingly."""

STAGES, SUM_STAGES = tl.constexpr(4), tl.constexpr(3)
"""Depth of the software pipeline over tiles, for statistics and for sums of gradients."""

JOINED_CHANNELS = 8
"""Channels of a program that joins what was found for the parts."""


@triton.jit
def _block_of_channels(block, channels, CHANNELS: tl.constexpr):
    """The channels of a block, and which of them exist."""
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    return channel, channel < channels


@triton.jit
def _part(n, part_rows, channels):
    """The voxels of this program's part, and where they begin."""
    first = tl.program_id(0) * part_rows
    start = (tl.cast(tl.program_id(2), tl.int64) * n + first) * channels
    return tl.minimum(part_rows, n - first), start


@triton.jit
def _tile(source, first, rows, channels, channel, inside, ROWS: tl.constexpr):
    """`ROWS` voxels from `first` on as they are stored, and which of them exist."""
    lane = tl.arange(0, ROWS)[:, None]
    exists = (first + lane < rows) & inside[None, :]
    offsets = lane * channels + channel[None, :]  # (ROWS, CHANNELS)
    return tl.load(source + tl.cast(first, tl.int64) * channels + offsets, mask=exists, other=0), exists


@triton.jit
def _measured(source, rows, channels, channel, inside, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of each channel of `rows` voxels: the mean, as a sum of two numbers, and the sum of squared deviations from it.

    The first number is the mean of the first tile, and deviations from it are summed: squares of values much larger
    than their deviations would cancel. Apart the two say how far means lie from each other more exactly than rounded.
    """
    value, _ = _tile(source, 0, rows, channels, channel, inside, ROWS)
    shift = tl.sum(value.to(tl.float32), 0) / tl.minimum(rows, ROWS)
    sums = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in tl.range(0, rows, ROWS, num_stages=STAGES):
        value, exists = _tile(source, first, rows, channels, channel, inside, ROWS)
        deviation = tl.where(exists, value.to(tl.float32) - shift[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation
    moved = tl.sum(sums, 0) / rows
    total = tl.sum(squares, 0) - rows * moved * moved
    return shift, moved, tl.where(total < 0, 0.0, total)


@triton.jit
def _scale(squares, n, eps):
    """1 / sqrt(variance + eps), of a sum of squared deviations."""
    return tl.rsqrt(squares / n + eps)


@triton.jit
def _statistics(source, channels, channel, inside, RESIDUAL: tl.constexpr):
    """Mean and scale of `x`, then of the residual where it is normalized."""
    mean = tl.load(source + channel, mask=inside, other=0)
    scale = tl.load(source + channels + channel, mask=inside, other=0)
    if RESIDUAL != 2:
        return mean, scale, mean, scale
    mean_r = tl.load(source + 2 * channels + channel, mask=inside, other=0)
    return mean, scale, mean_r, tl.load(source + 3 * channels + channel, mask=inside, other=0)


@triton.jit
def _write_normalized(
    x, residual, out, rows, channels, channel, inside, statistics, slope,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``leaky_relu(norm(x) + r)`` of `rows` voxels; `RESIDUAL` is 0 for none, 1 as it is, 2 normalized."""
    mean, scale, mean_r, scale_r = statistics
    lane = tl.arange(0, ROWS)[:, None]
    offsets = lane * channels + channel[None, :]  # (ROWS, CHANNELS)
    for first in range(0, rows, ROWS):
        exists = (first + lane < rows) & inside[None, :]
        value = tl.load(x + offsets, mask=exists, other=0).to(tl.float32)
        value = (value - mean[None, :]) * scale[None, :]
        if RESIDUAL:
            added = tl.load(residual + offsets, mask=exists, other=0).to(tl.float32)
            if RESIDUAL == 2:
                added = (added - mean_r[None, :]) * scale_r[None, :]
            value += added
            residual += ROWS * channels
        value = tl.where(value > 0, value, value * slope)
        tl.store(out + offsets, value.to(out.dtype.element_ty), mask=exists)
        x += ROWS * channels
        out += ROWS * channels


@triton.jit(do_not_specialize=["n", "part_rows", "parts"])
def measure(
    x, residual, found, n, channels, part_rows, parts,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``found[instance, part]`` = what `_measured` says of a part of `x` ``(3, C)``, then of the residual."""
    rows, start = _part(n, part_rows, channels)
    channel, inside = _block_of_channels(tl.program_id(1), channels, CHANNELS)
    quantities: tl.constexpr = 6 if RESIDUAL == 2 else 3
    found += (tl.program_id(2) * parts + tl.program_id(0)) * quantities * channels + channel
    shift, moved, squares = _measured(x + start, rows, channels, channel, inside, ROWS // 2, CHANNELS)
    tl.store(found, shift, mask=inside)
    tl.store(found + channels, moved, mask=inside)
    tl.store(found + 2 * channels, squares, mask=inside)
    if RESIDUAL == 2:
        shift, moved, squares = _measured(residual + start, rows, channels, channel, inside, ROWS // 2, CHANNELS)
        tl.store(found + 3 * channels, shift, mask=inside)
        tl.store(found + 4 * channels, moved, mask=inside)
        tl.store(found + 5 * channels, squares, mask=inside)


@triton.jit(do_not_specialize=["n", "part_rows", "parts"])
def join(found, statistics, n, channels, part_rows, parts, eps, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """``statistics[instance, pair]`` = mean and scale ``(2, C)``, from what `measure` found of the parts."""
    pair, pairs, instance = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    channel, inside = _block_of_channels(tl.program_id(0), channels, CHANNELS)
    part = tl.arange(0, PARTS)[:, None]
    exists = (part < parts) & inside[None, :]
    offsets = ((instance * parts + part) * pairs + pair) * 3 * channels + channel[None, :]  # (PARTS, CHANNELS)
    shifts = tl.load(found + offsets, mask=exists, other=0)
    moved = tl.load(found + channels + offsets, mask=exists, other=0)
    squares = tl.load(found + 2 * channels + offsets, mask=exists, other=0)
    rows = tl.minimum(part_rows, n - part * part_rows).to(tl.float32)
    shift = tl.sum(tl.where(part == 0, shifts, 0.0), 0)
    moved = tl.where(exists, shifts - shift[None, :] + moved, 0.0)  # means, from the first shift
    mean = tl.sum(tl.where(exists, rows * moved, 0.0), 0) / n
    apart = tl.where(exists, moved - mean[None, :], 0.0)
    total = tl.sum(squares + rows * apart * apart, 0)
    statistics += (instance * pairs + pair) * 2 * channels + channel
    tl.store(statistics, shift + mean, mask=inside)
    tl.store(statistics + channels, _scale(total, n, eps), mask=inside)


@triton.jit(do_not_specialize=["n", "part_rows"])
def normalize(
    x, residual, out, statistics, n, channels, part_rows, slope,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The output of a part."""
    rows, start = _part(n, part_rows, channels)
    channel, inside = _block_of_channels(tl.program_id(1), channels, CHANNELS)
    quantities: tl.constexpr = 4 if RESIDUAL == 2 else 2
    statistics += tl.program_id(2) * quantities * channels
    found = _statistics(statistics, channels, channel, inside, RESIDUAL)
    _write_normalized(
        x + start, residual + start if RESIDUAL else residual, out + start,
        rows, channels, channel, inside, found, slope, RESIDUAL, ROWS, CHANNELS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def normalize_small(
    x, residual, out, statistics, n, channels, eps, slope,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Statistics and output of a few channels of a small volume."""
    channel, inside = _block_of_channels(tl.program_id(1), channels, CHANNELS)
    start = tl.cast(tl.program_id(2), tl.int64) * n * channels
    quantities: tl.constexpr = 4 if RESIDUAL == 2 else 2
    statistics += tl.program_id(2) * quantities * channels
    shift, moved, squares = _measured(x + start, n, channels, channel, inside, ROWS // 2, CHANNELS)
    mean, scale = shift + moved, _scale(squares, n, eps)
    tl.store(statistics + channel, mean, mask=inside)
    tl.store(statistics + channels + channel, scale, mask=inside)
    mean_r, scale_r = mean, scale
    if RESIDUAL == 2:
        shift, moved, squares = _measured(residual + start, n, channels, channel, inside, ROWS // 2, CHANNELS)
        mean_r, scale_r = shift + moved, _scale(squares, n, eps)
        tl.store(statistics + 2 * channels + channel, mean_r, mask=inside)
        tl.store(statistics + 3 * channels + channel, scale_r, mask=inside)
    found = mean, scale, mean_r, scale_r
    _write_normalized(
        x + start, residual + start if RESIDUAL else residual, out + start,
        n, channels, channel, inside, found, slope, RESIDUAL, ROWS, CHANNELS,
    )  # fmt: skip


@triton.jit
def _gradient(
    grad_out, out, x, residual, offsets, exists, statistics, slope, RESIDUAL: tl.constexpr, FROM_OUTPUT: tl.constexpr
):
    """Of one tile: the gradient in front of the activation, and ``norm(x)`` and ``norm(residual)``.

    With `FROM_OUTPUT`, ``norm(x)`` is read off the output: the activation is all that lies between.
    """
    mean, scale, mean_r, scale_r = statistics
    grad = tl.load(grad_out + offsets, mask=exists, other=0).to(tl.float32)
    value = tl.load(out + offsets, mask=exists, other=0).to(tl.float32)
    grad = tl.where(value > 0, grad, grad * slope)
    if FROM_OUTPUT:
        normalized = tl.where(value > 0, value, value * (1 / slope))
    else:
        normalized = (tl.load(x + offsets, mask=exists, other=0).to(tl.float32) - mean[None, :]) * scale[None, :]
    normalized_r = normalized
    if RESIDUAL == 2:
        normalized_r = tl.load(residual + offsets, mask=exists, other=0).to(tl.float32)
        normalized_r = (normalized_r - mean_r[None, :]) * scale_r[None, :]
    return grad, normalized, normalized_r


@triton.jit
def _summed(
    grad_out, out, x, residual, rows, channels, channel, inside, statistics, slope,
    RESIDUAL: tl.constexpr, FROM_OUTPUT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums over `rows` voxels of the gradient and of its products with ``norm(x)`` and ``norm(residual)``."""
    lane = tl.arange(0, ROWS)[:, None]
    offsets = lane * channels + channel[None, :]  # (ROWS, CHANNELS)
    sums = tl.zeros((ROWS, CHANNELS), tl.float32)
    products = tl.zeros((ROWS, CHANNELS), tl.float32)
    products_r = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in tl.range(0, rows, ROWS, num_stages=SUM_STAGES):
        exists = (first + lane < rows) & inside[None, :]
        grad, normalized, normalized_r = _gradient(
            grad_out, out, x, residual, offsets, exists, statistics, slope, RESIDUAL, FROM_OUTPUT
        )
        sums += grad
        products += grad * normalized
        if RESIDUAL == 2:
            products_r += grad * normalized_r
            residual += ROWS * channels
        if not FROM_OUTPUT:
            x += ROWS * channels
        grad_out += ROWS * channels
        out += ROWS * channels
    return tl.sum(sums, 0), tl.sum(products, 0), tl.sum(products_r, 0)


@triton.jit
def _write_gradients(
    grad_out, out, x, residual, grad_x, grad_residual, rows, channels, channel, inside, statistics, means, slope,
    RESIDUAL: tl.constexpr, FROM_OUTPUT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of `rows` voxels of `x` and of the residual, from the means of what `_summed` sums."""
    mean_grad, mean_product, mean_product_r = means
    lane = tl.arange(0, ROWS)[:, None]
    offsets = lane * channels + channel[None, :]  # (ROWS, CHANNELS)
    for first in range(0, rows, ROWS):
        exists = (first + lane < rows) & inside[None, :]
        grad, normalized, normalized_r = _gradient(
            grad_out, out, x, residual, offsets, exists, statistics, slope, RESIDUAL, FROM_OUTPUT
        )
        value = statistics[1][None, :] * (grad - mean_grad[None, :] - normalized * mean_product[None, :])
        tl.store(grad_x + offsets, value.to(grad_x.dtype.element_ty), mask=exists)
        if RESIDUAL:
            if RESIDUAL == 2:
                grad = statistics[3][None, :] * (grad - mean_grad[None, :] - normalized_r * mean_product_r[None, :])
                residual += ROWS * channels
            tl.store(grad_residual + offsets, grad.to(grad_residual.dtype.element_ty), mask=exists)
            grad_residual += ROWS * channels
        if not FROM_OUTPUT:
            x += ROWS * channels
        grad_out += ROWS * channels
        out += ROWS * channels
        grad_x += ROWS * channels


@triton.jit(do_not_specialize=["n", "part_rows", "parts"])
def sum_gradients(
    grad_out, out, x, residual, statistics, found, n, channels, part_rows, parts, slope,
    RESIDUAL: tl.constexpr, FROM_OUTPUT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``found[instance, part]`` = what `_summed` gives of a part, ``(3, C)``."""
    rows, start = _part(n, part_rows, channels)
    channel, inside = _block_of_channels(tl.program_id(1), channels, CHANNELS)
    quantities: tl.constexpr = 4 if RESIDUAL == 2 else 2
    statistics += tl.program_id(2) * quantities * channels
    sums, products, products_r = _summed(
        grad_out + start, out + start, x if FROM_OUTPUT else x + start, residual + start if RESIDUAL == 2 else residual,
        rows, channels, channel, inside, _statistics(statistics, channels, channel, inside, RESIDUAL), slope,
        RESIDUAL, FROM_OUTPUT, ROWS, CHANNELS,
    )  # fmt: skip
    found += (tl.program_id(2) * parts + tl.program_id(0)) * 3 * channels
    tl.store(found + channel, sums, mask=inside)
    tl.store(found + channels + channel, products, mask=inside)
    tl.store(found + 2 * channels + channel, products_r, mask=inside)


@triton.jit(do_not_specialize=["n", "part_rows"])
def differentiate(
    grad_out, out, x, residual, grad_x, grad_residual, statistics, sums, n, channels, part_rows, slope,
    RESIDUAL: tl.constexpr, FROM_OUTPUT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradients of a part, from the sums ``(instances, 3, C)`` over all parts."""
    rows, start = _part(n, part_rows, channels)
    channel, inside = _block_of_channels(tl.program_id(1), channels, CHANNELS)
    quantities: tl.constexpr = 4 if RESIDUAL == 2 else 2
    statistics += tl.program_id(2) * quantities * channels
    sums += tl.program_id(2) * 3 * channels
    mean_grad = tl.load(sums + channel, mask=inside, other=0) / n
    mean_product = tl.load(sums + channels + channel, mask=inside, other=0) / n
    mean_product_r = tl.load(sums + 2 * channels + channel, mask=inside, other=0) / n
    _write_gradients(
        grad_out + start, out + start, x if FROM_OUTPUT else x + start, residual + start if RESIDUAL == 2 else residual,
        grad_x + start, grad_residual + start if RESIDUAL else grad_residual, rows, channels, channel, inside,
        _statistics(statistics, channels, channel, inside, RESIDUAL), (mean_grad, mean_product, mean_product_r), slope,
        RESIDUAL, FROM_OUTPUT, ROWS, CHANNELS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def differentiate_small(
    grad_out, out, x, residual, grad_x, grad_residual, statistics, n, channels, slope,
    RESIDUAL: tl.constexpr, FROM_OUTPUT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradients of a few channels of a small volume."""
    channel, inside = _block_of_channels(tl.program_id(1), channels, CHANNELS)
    start = tl.cast(tl.program_id(2), tl.int64) * n * channels
    grad_out += start
    out += start
    if not FROM_OUTPUT:
        x += start
    if RESIDUAL == 2:
        residual += start
    if RESIDUAL:
        grad_residual += start
    quantities: tl.constexpr = 4 if RESIDUAL == 2 else 2
    statistics += tl.program_id(2) * quantities * channels
    found = _statistics(statistics, channels, channel, inside, RESIDUAL)
    sums, products, products_r = _summed(
        grad_out, out, x, residual, n, channels, channel, inside, found, slope, RESIDUAL, FROM_OUTPUT, ROWS, CHANNELS
    )
    means = sums / n, products / n, products_r / n
    _write_gradients(
        grad_out, out, x, residual, grad_x + start, grad_residual, n, channels, channel, inside, found, means, slope,
        RESIDUAL, FROM_OUTPUT, ROWS, CHANNELS,
    )  # fmt: skip


@dataclass(frozen=True)
class _Cut:
    """How a volume is divided: tiles, blocks of channels, parts of voxels."""

    small: bool
    rows: int
    channels: int
    blocks: int
    parts: int
    part_rows: int

    @classmethod
    def of(cls, x: torch.Tensor, elements: int = ELEMENTS) -> _Cut:
        instances, channels = x.shape[0], x.shape[-1]
        voxels = x.numel() // (instances * channels)
        small = voxels <= SMALL_VOXELS
        width = min(triton.next_power_of_2(channels), SMALL_CHANNELS if small else MAX_CHANNELS)
        rows, blocks = elements // width, triton.cdiv(channels, width)
        wanted = 1 if small else max(1, PROGRAMS * multiprocessors(x.device) // (blocks * instances))
        part_rows = rows * triton.cdiv(triton.cdiv(voxels, wanted), rows)
        return cls(small, rows, width, blocks, triton.cdiv(voxels, part_rows), part_rows)


def _kind(residual: bool, normalize_residual: bool) -> int:
    """`RESIDUAL` of the kernels."""
    return 2 if normalize_residual else int(residual)


def _run(x, residual, out, normalize_residual: bool, eps: float, slope: float) -> torch.Tensor:
    """Write the output of `x` ``(B, *S, C)`` to `out`, which may be `x`; returns the statistics."""
    instances, channels = x.shape[0], x.shape[-1]
    kind = _kind(residual is not None, normalize_residual)
    pairs = 2 if kind == 2 else 1
    statistics = x.new_empty((instances, 2 * pairs, channels), dtype=torch.float32)
    if x.numel() == 0:
        return statistics
    cut, voxels = _Cut.of(x), x.numel() // (instances * channels)
    grid, shape = (cut.parts, cut.blocks, instances), {"ROWS": cut.rows, "CHANNELS": cut.channels, "num_warps": WARPS}
    with device_of(x):
        if cut.small:
            normalize_small[grid](x, residual, out, statistics, voxels, channels, eps, slope, kind, **shape)
            return statistics
        found = x.new_empty((instances, cut.parts, 3 * pairs, channels), dtype=torch.float32)
        measured = 2 if kind == 2 else 0  # a residual that is added as it is changes nothing here
        measure[grid](x, residual, found, voxels, channels, cut.part_rows, cut.parts, measured, **shape)
        width = min(triton.next_power_of_2(channels), JOINED_CHANNELS)
        join[(triton.cdiv(channels, width), pairs, instances)](
            *(found, statistics, voxels, channels, cut.part_rows, cut.parts, eps),
            *(triton.next_power_of_2(cut.parts), width),
            num_warps=WARPS,
        )
        normalize[grid](x, residual, out, statistics, voxels, channels, cut.part_rows, slope, kind, **shape)
    return statistics


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, normalize_residual: bool, eps: float, negative_slope: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of the reference's `forward`."""
    out = torch.empty_like(x)
    return out, _run(x, residual, out, normalize_residual, eps, negative_slope)


def forward_inplace(
    x: torch.Tensor, residual: torch.Tensor | None, normalize_residual: bool, eps: float, negative_slope: float
) -> None:
    """`forward` with the result in `x`."""
    _run(x, residual, x, normalize_residual, eps, negative_slope)


def backward(
    grad_out: torch.Tensor,
    out: torch.Tensor,
    x: torch.Tensor | None,
    residual: torch.Tensor | None,
    statistics: torch.Tensor,
    has_residual: bool,
    normalize_residual: bool,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Arguments and results of the reference's `backward`."""
    instances, channels = out.shape[0], out.shape[-1]
    kind = _kind(has_residual, normalize_residual)
    grad_x = torch.empty_like(out)
    grad_residual = torch.empty_like(out) if has_residual else None
    if out.numel() == 0:
        return grad_x, grad_residual
    cut = _Cut.of(out, ELEMENTS // 2 if kind == 2 else ELEMENTS)  # two norms take twice the registers
    voxels = out.numel() // (instances * channels)
    grid, shape = (cut.parts, cut.blocks, instances), {"ROWS": cut.rows, "CHANNELS": cut.channels, "num_warps": WARPS}
    given, gradients = (grad_out, out, x, residual), (grad_x, grad_residual)
    flags = (kind, x is None)
    with device_of(out):
        if cut.small:
            differentiate_small[grid](*given, *gradients, statistics, voxels, channels, negative_slope, *flags, **shape)
            return gradients
        found = out.new_empty((instances, cut.parts, 3, channels), dtype=torch.float32)
        numbers = (voxels, channels, cut.part_rows)
        sum_gradients[grid](*given, statistics, found, *numbers, cut.parts, negative_slope, *flags, **shape)
        differentiate[grid](*given, *gradients, statistics, found.sum(1), *numbers, negative_slope, *flags, **shape)
    return gradients
