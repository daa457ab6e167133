"""Shifted-window attention on the GPU: `csrc/cuda/window_attention_forward.cu` and `..._backward.cu`."""

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
    """Arguments and results of the reference's `forward`; without dropout (`supports`)."""
    _refuse(dropout_p)
    return torch.ops.swin_kernels_cuda.window_attention_forward(
        qkv, bias_table, pad_qkv, grid.nominal, grid.window, grid.shift, scale
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
    """Arguments and results of the reference's `backward`; without dropout (`supports`)."""
    _refuse(dropout_p)
    return torch.ops.swin_kernels_cuda.window_attention_backward(
        grad_out, qkv, bias_table, pad_qkv, out, lse, grid.nominal, grid.window, grid.shift, scale
    )


def _refuse(dropout_p: float) -> None:
    if dropout_p:
        raise ValueError(f"window_attention: dropout_p is {dropout_p}; the CUDA kernels accept 0")
