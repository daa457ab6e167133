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

import torch
from torch.utils.flop_counter import register_flop_formula

from ..backends import Call, forced_name, select
from ..backends.reference import window_partition as definition
from ..geometry import WindowGrid
from ._library import (
    LARGEST_INT,
    NAMESPACE,
    check_tensor,
    check_volume,
    check_windows,
    define,
    implement,
    library,
    per_axis,
    runs_definition,
)

define("window_partition(Tensor x, int[] window_size, int[] shift_size, str backend) -> Tensor")
define(
    "window_reverse(Tensor windows, int[] window_size, int[] shift_size, int[] spatial_shape, str backend) -> Tensor"
)


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
        window_size: nominal window, an int or one per axis. On an axis no longer than it, the
            window becomes the axis and the shift 0.
        shift_size: cyclic shift, an int or one per axis, ``0 ≤ shift < window``.
        backend: force a backend; None chooses.

    Returns:
        ``(B·nW, n, C)``: windows in raster order, tokens in raster order; padding tokens are zero.

    Raises:
        TypeError: an argument of the wrong type or layout.
        ValueError: wrong rank, empty extent, window < 1, shift out of range, unknown backend.
    """
    operator = "window_partition"
    window, shift = _check_partition(x, window_size, shift_size)
    if runs_definition(operator, backend):
        return definition.forward(x, WindowGrid.of(x.shape[1:-1], window, shift))
    return torch.ops.swin_kernels.window_partition(x, window, shift, forced_name(operator, backend))


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
        ValueError: shapes that do not belong together, window < 1, shift out of range, unknown backend.
    """
    operator = "window_reverse"
    window, shift, spatial = _check_reverse(windows, window_size, shift_size, spatial_shape)
    if runs_definition(operator, backend):
        return definition.backward(windows, WindowGrid.of(spatial, window, shift))
    return torch.ops.swin_kernels.window_reverse(windows, window, shift, spatial, forced_name(operator, backend))


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


def _call(operator: str, x: torch.Tensor, grid: WindowGrid) -> Call:
    return Call(operator, x.device.type, x.dtype, head_dim=0, window=grid.window)


def _partition(x: torch.Tensor, window: list[int], shift: list[int], backend: str) -> torch.Tensor:
    _check_partition(x, window, shift)
    grid = WindowGrid.of(x.shape[1:-1], window, shift)
    return select(_call("window_partition", x, grid), backend).window_partition.forward(x.contiguous(), grid)


def _reverse(windows: torch.Tensor, window: list[int], shift: list[int], spatial: list[int], backend: str):
    _check_reverse(windows, window, shift, spatial)
    grid = WindowGrid.of(spatial, window, shift)
    engine = select(_call("window_reverse", windows, grid), backend)
    return engine.window_partition.backward(windows.contiguous(), grid)


implement("window_partition", _partition)
implement("window_reverse", _reverse)


@torch.library.register_fake(f"{NAMESPACE}::window_partition", lib=library)
def _(x, window, shift, backend):
    _check_partition(x, window, shift)
    grid = WindowGrid.of(x.shape[1:-1], window, shift)
    return x.new_empty((x.shape[0] * grid.num_windows, grid.tokens, x.shape[-1]))


@torch.library.register_fake(f"{NAMESPACE}::window_reverse", lib=library)
def _(windows, window, shift, spatial, backend):
    _check_reverse(windows, window, shift, spatial)
    grid = WindowGrid.of(spatial, window, shift)
    return windows.new_empty((windows.shape[0] // grid.num_windows, *spatial, windows.shape[-1]))


def _partition_context(ctx, inputs, output):
    x, ctx.window, ctx.shift, ctx.backend = inputs
    ctx.spatial = x.shape[1:-1]


def _partition_backward(ctx, grad):
    grad_x = torch.ops.swin_kernels.window_reverse(grad, ctx.window, ctx.shift, ctx.spatial, ctx.backend)
    return grad_x, None, None, None


def _reverse_context(ctx, inputs, output):
    _, ctx.window, ctx.shift, _, ctx.backend = inputs


def _reverse_backward(ctx, grad):
    grad_windows = torch.ops.swin_kernels.window_partition(grad, ctx.window, ctx.shift, ctx.backend)
    return grad_windows, None, None, None, None


torch.library.register_autograd(
    f"{NAMESPACE}::window_partition", _partition_backward, setup_context=_partition_context, lib=library
)
torch.library.register_autograd(
    f"{NAMESPACE}::window_reverse", _reverse_backward, setup_context=_reverse_context, lib=library
)


@register_flop_formula([torch.ops.swin_kernels.window_partition, torch.ops.swin_kernels.window_reverse])
def _flops(*args, out_shape=None) -> int:
    return 0  # PyTorch's counter counts products of matrices alone
