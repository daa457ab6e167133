"""Window attention with its projection inside, on the processor: `csrc/cpu/window_attention_amx.h`."""

from __future__ import annotations

import torch

from ...geometry import WindowGrid


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bias_table: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    norm_eps: float | None,
    grid: WindowGrid,
    scale: float,
) -> torch.Tensor:
    """``(B, *S, C)`` to ``(B, *S, C)``; float32, on an instruction set that has the kernel."""
    return torch.ops.swin_kernels_cpu.projected_window_attention(
        x, weight, bias, bias_table, norm_weight, norm_bias, norm_eps, grid.nominal, grid.window, grid.shift, scale
    )
