"""Window attention with its projections inside, on the processor: `csrc/cpu/projected_window_attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...geometry import WindowGrid
from .window_attention import declines_window

if TYPE_CHECKING:
    from ...ops.projected_window_attention import ProjectedWindowAttentionCall


def declines(call: ProjectedWindowAttentionCall) -> str | None:
    if call.dtype != torch.float32:
        return f"dtype {call.dtype} has no kernel"
    if call.mixed:
        return "parameters of another dtype than x have no kernel"
    if not torch.ops.swin_kernels_cpu.projects(call.heads, call.heads * call.head_dim, call.backward):
        return f"{call.heads} heads of {call.head_dim} channels have no kernel on {torch.ops.swin_kernels_cpu.isa()}"
    return declines_window(call.window)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bias_table: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    out_weight: torch.Tensor | None,
    out_bias: torch.Tensor | None,
    norm_eps: float | None,
    grid: WindowGrid,
    scale: float,
    for_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments and results of the reference's `forward`."""
    return torch.ops.swin_kernels_cpu.projected_window_attention_forward(
        *(x, weight, bias, bias_table, norm_weight, norm_bias, norm_eps, out_weight, out_bias),
        *(grid.nominal, grid.window, grid.shift, scale, for_backward),
    )


def backward(
    grad_out: torch.Tensor,
    attended: torch.Tensor,
    lse: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bias_table: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    out_weight: torch.Tensor | None,
    out_bias: torch.Tensor | None,
    norm_eps: float | None,
    grid: WindowGrid,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Arguments and results of the reference's `backward`."""
    grad_x, grad_projection, grad_bias_table = torch.ops.swin_kernels_cpu.projected_window_attention_backward(
        *(grad_out, x, weight, bias, bias_table, norm_weight, norm_bias, norm_eps, out_weight, out_bias),
        *(attended, lse),
        *(grid.nominal, grid.window, grid.shift, scale),
    )
    channels = x.shape[-1]
    sizes = [3 * channels**2, 3 * channels, channels, channels, channels**2, channels]
    grad_weight, grad_bias, grad_norm_weight, grad_norm_bias, grad_out_weight, grad_out_bias = (
        part.clone() for part in grad_projection.split(sizes)
    )
    grads = grad_x, grad_weight.view(weight.shape), grad_bias, grad_bias_table, grad_norm_weight, grad_norm_bias
    return *grads, grad_out_weight.view(channels, channels), grad_out_bias
