"""Shifted-window attention on the processor: `csrc/cpu/window_attention.h`."""

from __future__ import annotations

import torch

from ...geometry import WindowGrid


def forward(
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    pad_qkv: torch.Tensor | None,
    seed: torch.Tensor | None,
    grid: WindowGrid,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of the reference's `forward`."""
    return torch.ops.swin_kernels_cpu.window_attention_forward(
        qkv, bias_table, pad_qkv, seed, grid.nominal, grid.window, grid.shift, scale, dropout_p
    )


def backward(
    grad_out: torch.Tensor,
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    pad_qkv: torch.Tensor | None,
    seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grid: WindowGrid,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments and results of the reference's `backward`."""
    return torch.ops.swin_kernels_cpu.window_attention_backward(
        grad_out, qkv, bias_table, pad_qkv, seed, out, lse, grid.nominal, grid.window, grid.shift, scale, dropout_p
    )
