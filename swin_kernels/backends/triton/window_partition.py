"""Window partition and reverse on the GPU: one copy each, padding and cyclic shift by index arithmetic."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ...geometry import WindowGrid
from .windows import arguments, check_counts, device_of, first_row, locate, unpack

if TYPE_CHECKING:
    from ...ops.window_partition import PartitionCall

MAX_WINDOW = 2**15  # the bound of `windows.divide`


ANY_DTYPE = True
"""The kernels copy."""


def declines(call: PartitionCall) -> str | None:
    tokens = math.prod(call.window)
    return f"a window of {tokens} tokens; at most {MAX_WINDOW} are supported" if tokens > MAX_WINDOW else None


TOKENS = 32
MAX_CHANNELS = 64
_ELEMENTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["n"])
def partition(volume, windows, channels, n, w, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """``windows[window, t] = volume[token t of window]``, zero where the token is padding."""
    w = unpack(w)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    window = tl.program_id(0)
    row, exists = locate(t, window, w, True, True)
    at = (first_row(window, w) + row)[:, None] * channels  # (TOKENS, 1)
    target = windows + (tl.cast(window, tl.int64) * n + t)[:, None] * channels
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = channel < channels
        value = tl.load(volume + at + channel, mask=exists[:, None] & inside, other=0)
        tl.store(target + channel, value, mask=(t < n)[:, None] & inside)


@triton.jit(do_not_specialize=["n"])
def reverse(windows, volume, channels, n, w, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """``volume[token t of window] = windows[window, t]``; padding is dropped."""
    w = unpack(w)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    window = tl.program_id(0)
    row, exists = locate(t, window, w, True, True)
    at = (first_row(window, w) + row)[:, None] * channels  # (TOKENS, 1)
    source = windows + (tl.cast(window, tl.int64) * n + t)[:, None] * channels
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = exists[:, None] & (channel < channels)
        value = tl.load(source + channel, mask=inside, other=0)
        tl.store(volume + at + channel, value, mask=inside)


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as integers of its element size: a copy needs no other type."""
    size = tensor.element_size()
    if size not in _ELEMENTS:  # complex128: two words an element
        return tensor.view(torch.int64)
    return tensor.view(_ELEMENTS[size])


def _launch(kernel, source: torch.Tensor, target: torch.Tensor, batch: int, grid: WindowGrid) -> torch.Tensor:
    """Run `kernel` from `source` to `target`; returns `target`."""
    if target.numel() == 0:
        return target
    check_counts("window_partition" if kernel is partition else "window_reverse", batch, grid)
    source, flat = _as_integers(source), _as_integers(target)
    channels = flat.shape[-1]
    block = min(triton.next_power_of_2(channels), MAX_CHANNELS)
    programs = (batch * grid.num_windows, triton.cdiv(grid.tokens, TOKENS))
    with device_of(source):
        kernel[programs](source, flat, channels, grid.tokens, arguments(grid), TOKENS, block)
    return target


def forward(x: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
    """``(B, *S, C)`` to ``(B·nW, n, C)``; padding tokens are zero."""
    windows = x.new_empty((x.shape[0] * grid.num_windows, grid.tokens, x.shape[-1]))
    return _launch(partition, x, windows, x.shape[0], grid)


def backward(windows: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
    """``(B·nW, n, C)`` back to ``(B, *S, C)``; padding tokens are dropped."""
    batch = windows.shape[0] // grid.num_windows
    volume = windows.new_empty((batch, *grid.spatial, windows.shape[-1]))
    return _launch(reverse, windows, volume, batch, grid)
