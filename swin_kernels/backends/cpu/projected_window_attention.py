"""Window attention with its projection inside, on the processor: `csrc/cpu/window_attention_projected.h`."""

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
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(B, *S, C)`` and the scores' log-sum-exp ``(B, *S, heads)``, ``(0,)`` if not wanted."""
    return torch.ops.swin_kernels_cpu.projected_window_attention_forward(
        *(x, weight, bias, bias_table, norm_weight, norm_bias, norm_eps),
        *(grid.nominal, grid.window, grid.shift, scale, with_lse),
    )


def backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bias_table: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    norm_eps: float | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grid: WindowGrid,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Gradients of `x`, `weight`, `bias`, `bias_table`, `norm_weight` and `norm_bias`, given or not."""
    grad_x, grad_projection, grad_bias_table = torch.ops.swin_kernels_cpu.projected_window_attention_backward(
        *(grad_out, x, weight, bias, bias_table, norm_weight, norm_bias, norm_eps, out, lse),
        *(grid.nominal, grid.window, grid.shift, scale),
    )
    channels = x.shape[-1]
    grad_weight, grad_bias, grad_norm_weight, grad_norm_bias = (
        part.clone() for part in grad_projection.split([3 * channels**2, 3 * channels, channels, channels])
    )
    return grad_x, grad_weight.view(weight.shape), grad_bias, grad_bias_table, grad_norm_weight, grad_norm_bias
