"""Shifted-window attention on the GPU: `csrc/cuda/window_attention_*.cu`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from ...geometry import WindowGrid
from . import library
from .preference import faster_elsewhere

if TYPE_CHECKING:
    from ...ops.window_attention import WindowAttentionCall

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""dtypes of the kernels, and their numbers in csrc/cuda/elements.h."""


def declines(call: WindowAttentionCall) -> str | None:
    if call.dtype not in ELEMENTS:
        return f"dtype {call.dtype} has no kernel"
    if call.dropout:
        return "attention dropout has no kernel"
    device = torch.cuda.current_device()
    return kernels_decline(device, call.dtype, call.head_dim, call.window, call.backward) or faster_elsewhere(
        library.capability(device), call
    )


@functools.lru_cache(maxsize=4096)
def kernels_decline(
    device: int, dtype: torch.dtype, head_dim: int, window: tuple[int, ...], backward: bool
) -> str | None:
    """The kernels' own answer for windows of `window` tokens; it may depend on the memory of the `device`."""
    with torch.cuda.device(device):
        return torch.ops.swin_kernels_cuda.attention_declines(ELEMENTS[dtype], head_dim, window, backward) or None


def forward(
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    pad_qkv: torch.Tensor | None,
    seed: torch.Tensor | None,
    grid: WindowGrid,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of the reference's `forward`; without dropout (`declines`)."""
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
    """Arguments and results of the reference's `backward`; without dropout (`declines`)."""
    _refuse(dropout_p)
    return torch.ops.swin_kernels_cuda.window_attention_backward(
        grad_out, qkv, bias_table, pad_qkv, out, lse, grid.nominal, grid.window, grid.shift, scale
    )


def _refuse(dropout_p: float) -> None:
    if dropout_p:
        raise ValueError(f"window_attention: dropout_p is {dropout_p}; the CUDA kernels accept 0")
