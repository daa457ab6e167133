"""Shifted-window attention on the processor: `csrc/cpu/window_attention`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ...geometry import WindowGrid

if TYPE_CHECKING:
    from ...ops.window_attention import WindowAttentionCall

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST_WINDOW = 4096
"""Tokens in a window (16³); `kLargestWindow` of csrc/torch/cpu/attention.h."""


def declines(call: WindowAttentionCall) -> str | None:
    if call.dtype not in DTYPES:
        return f"dtype {call.dtype} has no kernel"
    return declines_window(call.window)


def declines_window(window: tuple[int, ...]) -> str | None:
    """Why no attention runs inside windows of this size, or None."""
    if math.prod(window) > LARGEST_WINDOW:
        return f"a window of {math.prod(window)} tokens is larger than the {LARGEST_WINDOW} that fit in cache"
    return None


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
