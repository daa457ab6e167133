"""Where windows lie in a volume: the window arithmetic, in Python.

`csrc/geometry.h` is its C++ twin; `tests/test_geometry.py` compares the two. The
rules are those of MONAI's Swin UNETR (`monai.networks.nets.swin_unetr`):

- On an axis no longer than the nominal window, the window is the whole axis and its shift 0.
- Each axis is padded *at its end* to a multiple of its window; padding takes part in attention.
- The cyclic shift rolls the padded volume by ``-shift``: shifted position ``p`` holds padded
  position ``(p + shift) mod padded``.
- Each shifted axis falls into three regions; tokens of one window that lie in different regions do
  not belong together, and their score is lowered by ``MASK_VALUE``.
- The relative position bias is looked up by *nominal* raster: token ``t`` of a window is decoded in
  the full window's raster even when the window was clipped. Checkpoints depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MASK_VALUE = -100.0
"""Added to the score of two tokens of different regions (finite, as upstream has it)."""


@dataclass(frozen=True)
class WindowGrid:
    """The windows of one volume. Every tuple has one entry per spatial axis.

    Attributes:
        spatial: extents of the volume in tokens.
        nominal: the window size asked for; it fixes the relative position bias.
        window: the window size used, clipped to the axis.
        shift: the cyclic shift used, 0 on clipped axes.
    """

    spatial: tuple[int, ...]
    nominal: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]

    @staticmethod
    def clip(spatial: Sequence[int], window_size: Sequence[int]) -> tuple[int, ...]:
        """The window of `of`: on an axis that is no longer than the nominal window, the axis."""
        return tuple(s if s <= w else w for s, w in zip(spatial, window_size, strict=True))

    @classmethod
    def of(cls, spatial: Sequence[int], window_size: Sequence[int], shift_size: Sequence[int]) -> WindowGrid:
        """The grid of a volume of extents `spatial` under nominal `window_size` and `shift_size`."""
        clipped = [s <= w for s, w in zip(spatial, window_size, strict=True)]
        return cls(
            spatial=tuple(spatial),
            nominal=tuple(window_size),
            window=cls.clip(spatial, window_size),
            shift=tuple(0 if c else s for s, c in zip(shift_size, clipped, strict=True)),
        )

    @property
    def counts(self) -> tuple[int, ...]:
        """Windows per axis."""
        return tuple(-(-s // w) for s, w in zip(self.spatial, self.window, strict=True))

    @property
    def padded(self) -> tuple[int, ...]:
        """Extents after padding each axis to a multiple of its window."""
        return tuple(c * w for c, w in zip(self.counts, self.window, strict=True))

    @property
    def num_windows(self) -> int:
        """Windows in one volume (``nW``)."""
        return math.prod(self.counts)

    @property
    def tokens(self) -> int:
        """Tokens in one window (``n``)."""
        return math.prod(self.window)

    @property
    def is_shifted(self) -> bool:
        return any(self.shift)

    @property
    def is_padded(self) -> bool:
        return self.padded != self.spatial


def bias_table_length(nominal: Sequence[int]) -> int:
    """Rows of the relative position bias table of a nominal window: ``prod(2w - 1)``."""
    return math.prod([2 * w - 1 for w in nominal])


def _axis_positions(grid: WindowGrid, axis: int) -> torch.Tensor:
    """Shifted positions along one axis, by window and position in it: ``(counts[axis], window[axis])``."""
    return torch.arange(grid.padded[axis]).view(grid.counts[axis], grid.window[axis])


def _combine(per_axis: Sequence[torch.Tensor], strides: Sequence[int]) -> torch.Tensor:
    """Sum of ``strides[a] * per_axis[a]`` over all axes, windows first: ``(nW, n)``."""
    rank = len(per_axis)
    total = torch.zeros((1,) * (2 * rank), dtype=torch.long)
    for axis, (values, stride) in enumerate(zip(per_axis, strides, strict=True)):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = values.shape
        total = total + stride * values.view(shape)
    return total.reshape(math.prod(total.shape[:rank]), -1)


def _raster_strides(extents: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides of a grid of `extents`."""
    return tuple(math.prod(extents[axis + 1 :]) for axis in range(len(extents)))


def token_index(grid: WindowGrid) -> torch.Tensor:
    """Natural raster index of every window token, -1 where it is padding: int64 ``(nW, n)``."""
    positions, is_padding = [], []
    for axis, (shift, padded, extent) in enumerate(zip(grid.shift, grid.padded, grid.spatial, strict=True)):
        source = (_axis_positions(grid, axis) + shift) % padded
        positions.append(source)
        is_padding.append((source >= extent).long())
    index = _combine(positions, _raster_strides(grid.spatial))
    return index.masked_fill(_combine(is_padding, [1] * len(is_padding)) > 0, -1)


def region_labels(grid: WindowGrid) -> torch.Tensor:
    """Region of every window token; two tokens attend freely iff theirs agree: int64 ``(nW, n)``.

    An axis without a shift is one region; a shifted one is cut at ``padded - window`` and at
    ``padded - shift``, as in MONAI's `compute_mask`.
    """
    labels = []
    for axis, (shift, padded, window) in enumerate(zip(grid.shift, grid.padded, grid.window, strict=True)):
        p = _axis_positions(grid, axis)
        cut = (p >= padded - window).long() + (p >= padded - shift).long()
        labels.append(cut if shift else torch.zeros_like(p))
    return _combine(labels, _raster_strides((3,) * len(labels)))


def bias_index(nominal: Sequence[int], tokens: int) -> torch.Tensor:
    """Row of the bias table for each (query, key) pair of the first `tokens`: int64 ``(n, n)``.

    With ``r`` the raster of the nominal window read in an array of extents ``2w - 1``, the entry is
    ``r(query) - r(key) + r(w - 1)``: the upstream index, also for clipped windows (module docstring).
    """
    strides = _raster_strides([2 * w - 1 for w in nominal])
    one_window = WindowGrid.of(nominal, nominal, [0] * len(nominal))
    raster = _combine([_axis_positions(one_window, axis) for axis in range(len(nominal))], strides)[0, :tokens]
    origin = sum((w - 1) * s for w, s in zip(nominal, strides, strict=True))
    return raster[:, None] - raster[None, :] + origin


# Attention dropout draws its mask from a counter-based hash, so that every backend drops the same
# elements and the backward can draw them again without storing them. All arithmetic is modulo 2^32.
_GOLDEN = 0x9E3779B9
_MASK32 = 0xFFFFFFFF


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """The `lowbias32` integer finaliser (C. Wellons, "hash-prospector", public domain)."""
    x = x & _MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def dropout_threshold(dropout_p: float) -> int:
    """An element is dropped iff its 32-bit hash is below this."""
    return min(int(dropout_p * 2.0**32), _MASK32)


def dropout_keep(seed: torch.Tensor, rows: torch.Tensor, tokens: int, dropout_p: float) -> torch.Tensor:
    """Which scores survive attention dropout: bool ``(*rows.shape, n)``.

    Args:
        seed: int64 ``(1,)``.
        rows: int64, the row of each query: ``((batch · nW + window) · heads + head) · n + query``.
        tokens: keys in a row (``n``).
        dropout_p: probability of dropping.
    """
    low, high = seed & _MASK32, (seed >> 32) & _MASK32
    row_hash = _mix32(_mix32((rows & _MASK32) ^ low) + (rows >> 32) + high)
    keys = torch.arange(tokens, device=rows.device)
    return _mix32(row_hash[..., None] + keys * _GOLDEN) >= dropout_threshold(dropout_p)
