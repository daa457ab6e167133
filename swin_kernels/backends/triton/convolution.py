"""Convolutions of 16-bit volumes on the GPU with few input or few output channels, for which PyTorch's are slow.

With few input channels, as in the first layer, which reads an image, the time goes into writing the result: a program
gathers the input of every tap of its voxels, all channels side by side, and multiplies it by the weight as one matrix.
With few output channels PyTorch's kernels compute more of them than there are. Here a program has all output channels
of its voxels and walks over the taps; a second input is read where it lies, and no concatenation is written. Gradients
are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .windows import device_of

if TYPE_CHECKING:
    from ...ops.convolution import ConvolutionCall

FEW_INPUTS = 4
"""Most input channels of `convolve_few`: those of an image."""

FEW_VOXELS, FEW_CHANNELS, WARPS = 128, 64, 4
"""Tile of the output, and warps of a program, of `convolve_few`."""

MOST_OUTPUTS = 64
"""Most output channels of `convolve`; with more, PyTorch's kernels waste nothing."""


@dataclass(frozen=True)
class Tile:
    """How `convolve` is cut.

    Attributes:
        voxels: of a tile of the output; a power of two.
        warps: of a program.
        read: input channels of a step; a power of two, at least 16.
        stages: depth of the software pipeline over steps.
    """

    voxels: int = 256
    warps: int = 8
    read: int = 64
    stages: int = 3


_override: Tile | None = None


@contextmanager
def override(tile: Tile) -> Iterator[None]:
    """Cut every convolution by `tile` within the context."""
    global _override
    _override = tile
    try:
        yield
    finally:
        _override = None


def tile_for(inputs: int, beside: int) -> Tile:
    """The tile for inputs of `inputs` and `beside` channels."""
    if _override:
        return _override
    if max(inputs, beside) <= 64:
        return Tile()
    return Tile(read=32 if inputs % 32 == beside % 32 == 0 else 16)  # a divisor, so that nothing is wasted


@triton.jit(do_not_specialize=["depth", "height", "width"])
def convolve_few(
    x, weight, out, depth, height, width, channels,
    KERNEL: tl.constexpr, INPUTS: tl.constexpr, PRODUCTS: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The output ``(VOXELS, CHANNELS)`` of a tile; `weight` is ``(KERNEL³ · INPUTS, channels)``."""
    voxels = depth * height * width
    voxel = (tl.program_id(0) * VOXELS + tl.arange(0, VOXELS))[:, None]
    product = tl.arange(0, PRODUCTS)[None, :]
    tap = product // INPUTS
    half: tl.constexpr = KERNEL // 2
    d = voxel // (height * width) + tap // (KERNEL * KERNEL) - half
    h = voxel // width % height + tap // KERNEL % KERNEL - half
    w = voxel % width + tap % KERNEL - half
    exists = (voxel < voxels) & (product < KERNEL * KERNEL * KERNEL * INPUTS)
    exists &= (d >= 0) & (d < depth) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    x += tl.cast(tl.program_id(2), tl.int64) * voxels * INPUTS
    values = tl.load(x + ((d * height + h) * width + w) * INPUTS + product % INPUTS, mask=exists, other=0)
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    row = tl.arange(0, PRODUCTS)[:, None]
    real = (row < KERNEL * KERNEL * KERNEL * INPUTS) & (channel < channels)
    factors = tl.load(weight + row * channels + channel, mask=real, other=0)
    result = tl.dot(values, factors)
    first = tl.program_id(0) * VOXELS
    out += (tl.cast(tl.program_id(2), tl.int64) * voxels + first) * channels
    lane = tl.arange(0, VOXELS)[:, None]
    tl.store(
        out + lane * channels + channel, result.to(out.dtype.element_ty), mask=(voxel < voxels) & (channel < channels)
    )


@triton.jit
def _accumulated(
    source, weight, result, voxel, d, h, w, depth, height, width, inputs, channel, channels, weight_channels,
    KERNEL: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`result` with the products of all taps of one source added; `source` begins at the tile's first voxel."""
    blocks = tl.cdiv(inputs, INPUTS)
    half: tl.constexpr = KERNEL // 2
    for step in tl.range(0, KERNEL * KERNEL * KERNEL * blocks, num_stages=STAGES):
        tap = step // blocks
        by_d, by_h, by_w = tap // (KERNEL * KERNEL) - half, tap // KERNEL % KERNEL - half, tap % KERNEL - half
        exists = (d + by_d >= 0) & (d + by_d < depth) & (h + by_h >= 0) & (h + by_h < height)
        exists &= (w + by_w >= 0) & (w + by_w < width)
        row = voxel + (by_d * height + by_h) * width + by_w
        read = step % blocks * INPUTS + tl.arange(0, INPUTS)
        values = tl.load(
            source + row[:, None] * inputs + read[None, :], mask=exists[:, None] & (read < inputs)[None, :], other=0
        )
        factors = tl.load(
            weight + (tap * weight_channels + read)[:, None] * channels + channel[None, :],
            mask=(read < inputs)[:, None] & (channel < channels)[None, :],
            other=0,
        )
        result = tl.dot(values, factors, result)
    return result


@triton.jit(do_not_specialize=["depth", "height", "width"])
def convolve(
    x, skip, weight, out, depth, height, width, inputs, beside, channels,
    SKIP: tl.constexpr, KERNEL: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr, VOXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """The output ``(VOXELS, CHANNELS)`` of a tile; `weight` is ``(KERNEL³, inputs + beside, channels)``."""
    voxels = depth * height * width
    first = tl.program_id(0) * VOXELS
    voxel = tl.arange(0, VOXELS)
    # A voxel beyond the end lies beyond the depth by more than any tap reaches back.
    d = tl.where(first + voxel < voxels, (first + voxel) // (height * width), depth + KERNEL)
    h, w = (first + voxel) // width % height, (first + voxel) % width
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start = tl.cast(tl.program_id(2), tl.int64) * voxels + first
    result = tl.zeros((VOXELS, CHANNELS), tl.float32)
    result = _accumulated(
        x + start * inputs, weight, result, voxel, d, h, w, depth, height, width, inputs, channel, channels,
        inputs + beside, KERNEL, INPUTS, STAGES,
    )  # fmt: skip
    if SKIP:
        result = _accumulated(
            skip + start * beside, weight + inputs * channels, result, voxel, d, h, w, depth, height, width, beside,
            channel, channels, inputs + beside, KERNEL, INPUTS, STAGES,
        )  # fmt: skip
    out += start * channels
    exists = (first + voxel < voxels)[:, None] & (channel < channels)[None, :]
    tl.store(out + voxel[:, None] * channels + channel[None, :], result.to(out.dtype.element_ty), mask=exists)


def declines(call: ConvolutionCall) -> str | None:
    if call.dtype == torch.float32:
        return "float32 has no convolution kernel"
    if len(call.window) != 3:
        return f"a convolution over {len(call.window)} axes; there is a kernel for 3"
    if call.backward:
        return "gradients of a convolution have no kernel"
    return _declines_channels(*call.channels)


def _declines_channels(inputs: int, beside: int, outputs: int) -> str | None:
    if inputs <= FEW_INPUTS and not beside:
        return None
    if inputs % 16 or beside % 16:
        return f"{inputs} + {beside} input channels; kernels take multiples of 16, or up to {FEW_INPUTS} of x alone"
    if outputs > MOST_OUTPUTS:
        return f"PyTorch's convolution is as fast for {outputs} output channels; up to {MOST_OUTPUTS} have a kernel"
    return None


def forward(x: torch.Tensor, skip: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """Arguments and result of the reference's `forward`."""
    batch, *extents, inputs = x.shape
    channels, kernel = weight.shape[0], weight.shape[-1]
    out = x.new_empty((batch, *extents, channels))
    if out.numel() == 0:
        return out
    matrix = weight.permute(2, 3, 4, 1, 0).contiguous()  # (kernel, kernel, kernel, inputs + beside, channels)
    voxels = out.numel() // (batch * channels)
    with device_of(x):
        if inputs <= FEW_INPUTS:
            products = max(16, triton.next_power_of_2(kernel**3 * inputs))
            convolve_few[(triton.cdiv(voxels, FEW_VOXELS), triton.cdiv(channels, FEW_CHANNELS), batch)](
                *(x, matrix, out, *extents, channels),
                *(kernel, inputs, products, FEW_VOXELS, FEW_CHANNELS),
                num_warps=WARPS,
            )
            return out
        beside = 0 if skip is None else skip.shape[-1]
        tile = tile_for(inputs, beside)
        convolve[(triton.cdiv(voxels, tile.voxels), 1, batch)](
            *(x, skip, matrix, out, *extents, inputs, beside, channels),
            *(skip is not None, kernel, tile.read, tile.stages, tile.voxels, MOST_OUTPUTS),
            num_warps=tile.warps,
        )
    return out


backward = None
"""Gradients are left to other backends: see `declines`."""
