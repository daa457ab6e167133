"""Window partition and reverse on the processor: `csrc/cpu/window_partition`."""

from __future__ import annotations

import torch

from ...geometry import WindowGrid
from .. import Call


def declines(call: Call) -> str | None:
    return None


def forward(x: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
    """``(B, *S, C)`` to ``(B·nW, n, C)``; padding tokens are zero."""
    return torch.ops.swin_kernels_cpu.window_partition(x, grid.window, grid.shift)


def backward(windows: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
    """``(B·nW, n, C)`` back to ``(B, *S, C)``; padding tokens are dropped."""
    return torch.ops.swin_kernels_cpu.window_reverse(windows, grid.window, grid.shift, grid.spatial)
