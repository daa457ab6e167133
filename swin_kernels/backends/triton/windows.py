"""The arithmetic of `geometry.py` inside kernels: where a window's tokens lie, and which belong together.

A two-dimensional volume is one of depth 1. Nothing is looked up: kernels get the fifteen integers of
`arguments` and compute token positions, padding and regions from them, so no index tensor exists.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...geometry import WindowGrid


class Windows(NamedTuple):
    """The windows of a volume, as a kernel sees them: scalars, one per axis."""

    extent_d: tl.tensor
    extent_h: tl.tensor
    extent_w: tl.tensor
    window_d: tl.tensor
    window_h: tl.tensor
    window_w: tl.tensor
    shift_d: tl.tensor
    shift_h: tl.tensor
    shift_w: tl.tensor
    count_d: tl.tensor
    count_h: tl.tensor
    count_w: tl.tensor
    nominal_d: tl.tensor
    nominal_h: tl.tensor
    nominal_w: tl.tensor


def arguments(grid: WindowGrid) -> Windows:
    """The launch argument `w` of every kernel: `Windows` of a grid of two or three axes.

    They travel as floats (exact to 2^24) because Triton compiles a kernel again for every integer that is
    1 or a multiple of 16; so one binary serves every volume.
    """
    values: list[float] = []
    for field, fill in ((grid.spatial, 1), (grid.window, 1), (grid.shift, 0), (grid.counts, 1), (grid.nominal, 1)):
        values += [float(fill)] * (3 - len(field)) + [float(value) for value in field]
    return Windows(*values)


LONGEST_AXIS, MOST_COUNTED = 2**24, 2**31 - 1
"""Tokens of an axis, which travel as float32; tokens of a volume and windows of a batch, which take 32 bits."""


def check_counts(operator: str, batch: int, grid: WindowGrid) -> None:
    """Raise `RuntimeError` if a call has more tokens or windows than the kernels can count."""
    if max(grid.padded) > LONGEST_AXIS or math.prod(grid.padded) > MOST_COUNTED:
        raise RuntimeError(
            f"{operator}: the volume is {grid.spatial}; the Triton kernels take axes of at most {LONGEST_AXIS} tokens "
            f"and volumes of at most {MOST_COUNTED}, padding included"
        )
    if batch * grid.num_windows > MOST_COUNTED:
        raise RuntimeError(
            f"{operator}: {batch} volumes of {grid.num_windows} windows; the Triton kernels take at most "
            f"{MOST_COUNTED} windows"
        )


def device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Makes the GPU of `tensor` current: Triton launches on the current one, wherever its arguments lie."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def unpack(w):
    """The integers that `arguments` sent."""
    return Windows(
        tl.cast(w.extent_d, tl.int32),
        tl.cast(w.extent_h, tl.int32),
        tl.cast(w.extent_w, tl.int32),
        tl.cast(w.window_d, tl.int32),
        tl.cast(w.window_h, tl.int32),
        tl.cast(w.window_w, tl.int32),
        tl.cast(w.shift_d, tl.int32),
        tl.cast(w.shift_h, tl.int32),
        tl.cast(w.shift_w, tl.int32),
        tl.cast(w.count_d, tl.int32),
        tl.cast(w.count_h, tl.int32),
        tl.cast(w.count_w, tl.int32),
        tl.cast(w.nominal_d, tl.int32),
        tl.cast(w.nominal_h, tl.int32),
        tl.cast(w.nominal_w, tl.int32),
    )


@triton.jit
def divide(x, divisor):
    """``x // divisor`` for tensors with ``0 ≤ x`` and ``x · divisor < 2^30``: one high multiplication."""
    return tl.umulhi(4 * x, (1 << 30) // divisor + 1)


@triton.jit
def coordinates(raster, height, width):
    """Coordinates of raster positions in a box of extents ``(·, height, width)``."""
    d = divide(raster, height * width)
    rest = raster - d * (height * width)
    h = divide(rest, width)
    return d, h, rest - h * width


@triton.jit
def place(window, w):
    """Window `window` of the batch: its volume, and its place on each axis in windows."""
    per_volume = w.count_d * w.count_h * w.count_w
    volume = window // per_volume
    index = window - volume * per_volume
    return volume, index // (w.count_h * w.count_w), index // w.count_w % w.count_h, index % w.count_w


@triton.jit
def first_row(window, w):
    """Raster index over the batch (int64) of the first token of the volume that holds a window."""
    volume = window // (w.count_d * w.count_h * w.count_w)
    return tl.cast(volume, tl.int64) * w.extent_d * w.extent_h * w.extent_w


@triton.jit
def _source(local, start, window, shift, count, SHIFTED: tl.constexpr):
    """Position in the padded volume of place `local` of the window that begins at `start` after the shift."""
    position = start * window + local
    if SHIFTED:
        position += shift
        position = tl.where(position >= count * window, position - count * window, position)
    return position


@triton.jit
def locate(local, window, w, SHIFTED: tl.constexpr, PADDED: tl.constexpr):
    """Raster index in its volume of a window's tokens, and which exist: padding and ``local ≥ n`` do not.

    A volume has less than 2^31 tokens; what is multiplied by the channels must be 64-bit.
    """
    _, start_d, start_h, start_w = place(window, w)
    local_d, local_h, local_w = coordinates(local, w.window_h, w.window_w)
    d = _source(local_d, start_d, w.window_d, w.shift_d, w.count_d, SHIFTED)
    h = _source(local_h, start_h, w.window_h, w.shift_h, w.count_h, SHIFTED)
    x = _source(local_w, start_w, w.window_w, w.shift_w, w.count_w, SHIFTED)
    exists = local_d < w.window_d
    if PADDED:
        exists = exists & (d < w.extent_d) & (h < w.extent_h) & (x < w.extent_w)
    return (d * w.extent_h + h) * w.extent_w + x, exists


@triton.jit
def beyond(local, w):
    """Which seams a window's tokens would lie beyond: bits 4, 2 and 1 for depth, height and width."""
    local_d, local_h, local_w = coordinates(local, w.window_h, w.window_w)
    beyond_d = (local_d >= w.window_d - w.shift_d).to(tl.int32)
    beyond_h = (local_h >= w.window_h - w.shift_h).to(tl.int32)
    beyond_w = (local_w >= w.window_w - w.shift_w).to(tl.int32)
    return beyond_d * 4 + beyond_h * 2 + beyond_w


@triton.jit
def seams(window, w):
    """The seams of the cyclic shift that a window touches, as bits of `beyond`: the last window of a shifted axis does.

    Within a window, ``beyond & seams`` tells apart the regions of `geometry.region_labels`.
    """
    _, start_d, start_h, start_w = place(window, w)
    seam_d = tl.where((w.shift_d > 0) & (start_d == w.count_d - 1), 4, 0)
    seam_h = tl.where((w.shift_h > 0) & (start_h == w.count_h - 1), 2, 0)
    seam_w = tl.where((w.shift_w > 0) & (start_w == w.count_w - 1), 1, 0)
    return seam_d + seam_h + seam_w


@triton.jit
def bias_raster(local, w):
    """``r`` of `geometry.bias_index`: the nominal raster, read in an array of extents ``2 · nominal - 1``."""
    d = local // (w.nominal_h * w.nominal_w)
    h = local // w.nominal_w % w.nominal_h
    x = local % w.nominal_w
    return (d * (2 * w.nominal_h - 1) + h) * (2 * w.nominal_w - 1) + x


@triton.jit
def bias_origin(w):
    """``r`` of the last nominal token, which makes every difference of two rasters a table row."""
    return ((w.nominal_d - 1) * (2 * w.nominal_h - 1) + w.nominal_h - 1) * (2 * w.nominal_w - 1) + w.nominal_w - 1
