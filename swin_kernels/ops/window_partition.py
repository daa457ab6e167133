"""`window_partition` and `window_reverse`: pad, cyclic shift and partition in one pass, and back.

Contract: with ``g = geometry.WindowGrid.of(S, window_size, shift_size)`` and
``t = geometry.token_index(g)``, ``windows[b·nW + w, i] = x[b].flatten(0, -2)[t[w, i]]`` or zeros where
``t[w, i] = -1``. `window_reverse` is the inverse: it crops the padding and rolls back. Each is the
other's backward. Source: Liu et al., "Swin Transformer", https://arxiv.org/abs/2103.14030, with the
padding and clipping of MONAI's Swin UNETR.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..backends import Call
from ..geometry import WindowGrid
from ._checks import LARGEST_INT, check_tensor, check_volume, check_windows, per_axis
from ._operator import Example, Operator, Pass


@dataclass(frozen=True, kw_only=True)
class PartitionCall(Call):
    """A call of `window_partition`.

    Attributes:
        window: window size after clipping.
    """

    operator = kernel = "window_partition"
    window: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ReverseCall(PartitionCall):
    """A call of `window_reverse`, which is the backward of a backend's `window_partition`."""

    operator = "window_reverse"


def window_partition(
    x: torch.Tensor,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Cut a volume into (shifted) windows: pad, roll by ``-shift`` and partition in one pass.

    Args:
        x: ``(B, *S, C)`` with ``S`` = (D, H, W) or (H, W); any dtype.
        window_size: nominal window, an int or one per axis. On an axis that is no
            longer, the window is the whole axis and the shift 0.
        shift_size: cyclic shift, an int or one per axis, ``0 ≤ shift < window``.
        backend: force a backend; None chooses.

    Returns:
        ``(B·nW, n, C)``: windows in raster order, tokens in raster order; padding tokens are zero.

    Raises:
        TypeError: an argument of the wrong type or layout.
        ValueError: wrong rank, empty extent, window < 1, shift out of range, unknown backend.
    """
    return _PARTITION(_prepare_partition(x, window_size, shift_size), backend)


def window_reverse(
    windows: torch.Tensor,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int],
    spatial_shape: Sequence[int],
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Put (shifted) windows back into their volume: the inverse of `window_partition`, crop included.

    Args:
        windows: ``(B·nW, n, C)``; any dtype.
        window_size: nominal window, as given to `window_partition`.
        shift_size: cyclic shift, as given to `window_partition`.
        spatial_shape: extents of the volume, (D, H, W) or (H, W).
        backend: force a backend; None chooses.

    Returns:
        ``(B, *spatial_shape, C)``.

    Raises:
        TypeError: an argument of the wrong type or layout.
        ValueError: shapes that do not match, window < 1, shift out of range, unknown backend.
    """
    return _REVERSE(_prepare_reverse(windows, window_size, shift_size, spatial_shape), backend)


def _prepare_partition(x, window_size, shift_size=0) -> tuple:
    return x, *_check_partition(x, window_size, shift_size)


def _prepare_reverse(windows, window_size, shift_size, spatial_shape) -> tuple:
    return windows, *_check_reverse(windows, window_size, shift_size, spatial_shape)


def _check_partition(x, window_size, shift_size) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check the arguments of `window_partition`; returns nominal window and shift per axis."""
    operator = "window_partition"
    check_tensor(operator, "x", x)
    check_volume(operator, "x", x)
    return check_windows(operator, x.dim() - 2, window_size, shift_size)


def _check_reverse(windows, window_size, shift_size, spatial_shape) -> tuple[tuple[int, ...], ...]:
    """Check the arguments of `window_reverse`; returns nominal window, shift and extents per axis."""
    operator = "window_reverse"
    check_tensor(operator, "windows", windows)
    if windows.dim() != 3 or windows.shape[2] < 1:
        raise ValueError(f"{operator}: windows has shape {tuple(windows.shape)}; accepted is (B·nW, n, C)")
    if not isinstance(spatial_shape, Sequence) or len(spatial_shape) not in (2, 3):
        raise ValueError(f"{operator}: spatial_shape is {spatial_shape!r}; accepted is (D, H, W) or (H, W)")
    spatial = per_axis(spatial_shape, len(spatial_shape), f"{operator}: spatial_shape")
    if any(extent < 1 for extent in spatial):
        raise ValueError(f"{operator}: spatial_shape is {spatial}; every entry must be at least 1")
    window, shift = check_windows(operator, len(spatial), window_size, shift_size)
    grid = WindowGrid.of(spatial, window, shift)
    if math.prod(grid.padded) > LARGEST_INT:
        raise ValueError(f"{operator}: spatial_shape is {spatial}; its tokens, padding included, must fit in 64 bits")
    if windows.shape[0] % grid.num_windows or windows.shape[1] != grid.tokens:
        raise ValueError(
            f"{operator}: windows has shape {tuple(windows.shape)}; spatial_shape {spatial} with window_size {window} "
            f"needs (a multiple of {grid.num_windows}, {grid.tokens}, C)"
        )
    return window, shift, spatial


def _call_partition(x, window, shift) -> Call:
    return PartitionCall(device=x.device.type, dtype=x.dtype, window=WindowGrid.clip(x.shape[1:-1], window))


def _call_reverse(windows, window, shift, spatial) -> Call:
    return ReverseCall(device=windows.device.type, dtype=windows.dtype, window=WindowGrid.clip(spatial, window))


def _partition(kernel, x, window, shift):
    return kernel.forward(x, WindowGrid.of(x.shape[1:-1], window, shift))


def _reverse(kernel, windows, window, shift, spatial):
    return kernel.backward(windows, WindowGrid.of(spatial, window, shift))


def _fake_partition(x, window, shift):
    grid = WindowGrid.of(x.shape[1:-1], window, shift)
    return x.new_empty((x.shape[0] * grid.num_windows, grid.tokens, x.shape[-1]))


def _fake_reverse(windows, window, shift, spatial):
    grid = WindowGrid.of(spatial, window, shift)
    return windows.new_empty((windows.shape[0] // grid.num_windows, *spatial, windows.shape[-1]))


def _saved_partition(arguments, windows):
    x, window, shift = arguments
    return window, shift, x.shape[1:-1]


def _saved_reverse(arguments, x):
    _, window, shift, _ = arguments
    return window, shift


_PLACES = (
    ((9, 8, 7), (7, 7, 7), (3, 3, 3)),
    ((3, 9, 8), (4, 4, 4), (2, 2, 2)),
    ((10, 9), (7, 7), (3, 3)),
    ((5, 4, 6), (3, 2, 3), (1, 1, 0)),
)


def _partition_example(spatial, window, shift, channels: int = 15) -> Example:
    return Example(
        f"{'×'.join(map(str, spatial))} in windows of {'×'.join(map(str, window))}",
        {"x": (2, *spatial, channels)},
        {"window_size": window, "shift_size": shift},
    )


def _reverse_example(spatial, window, shift, channels: int = 15) -> Example:
    grid = WindowGrid.of(spatial, window, shift)
    return Example(
        f"{'×'.join(map(str, spatial))} of windows of {'×'.join(map(str, window))}",
        {"windows": (2 * grid.num_windows, grid.tokens, channels)},
        {"window_size": window, "shift_size": shift, "spatial_shape": spatial},
    )


_SHIFTED = ((7,) * 3, (3,) * 3)

_PARTITION = Operator(
    public=window_partition,
    summary="`(B, *S, C)` → `(B·nW, n, C)`: pad, shift and partition in one pass",
    call_type=PartitionCall,
    prepare=_prepare_partition,
    forward=Pass(
        "(Tensor x, int[] window_size, int[] shift_size) -> Tensor",
        check=_check_partition,
        call=_call_partition,
        run=_partition,
        fake=_fake_partition,
    ),
    backward="window_reverse",
    saved=_saved_partition,
    examples=tuple(_partition_example(*place) for place in _PLACES),
    timed={
        "cpu": _partition_example((12,) * 3, *_SHIFTED, 144),
        "cuda": _partition_example((48,) * 3, *_SHIFTED, 144),
    },
    exact=True,
)

_REVERSE = Operator(
    public=window_reverse,
    summary="`(B·nW, n, C)` → `(B, *S, C)`: the inverse, crop included",
    call_type=ReverseCall,
    prepare=_prepare_reverse,
    forward=Pass(
        "(Tensor windows, int[] window_size, int[] shift_size, int[] spatial_shape) -> Tensor",
        check=_check_reverse,
        call=_call_reverse,
        run=_reverse,
        fake=_fake_reverse,
    ),
    backward="window_partition",
    saved=_saved_reverse,
    examples=tuple(_reverse_example(*place) for place in _PLACES),
    timed={
        "cpu": _reverse_example((12,) * 3, *_SHIFTED, 144),
        "cuda": _reverse_example((48,) * 3, *_SHIFTED, 144),
    },
    exact=True,
)
