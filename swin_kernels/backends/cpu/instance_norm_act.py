"""Instance norm, residual and LeakyReLU on the processor: `csrc/cpu/instance_norm_act`."""

from __future__ import annotations

import torch

from .. import Call

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def declines(call: Call) -> str | None:
    return None if call.dtype in DTYPES else f"dtype {call.dtype} has no kernel"


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, normalize_residual: bool, eps: float, negative_slope: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of the reference's `forward`."""
    return torch.ops.swin_kernels_cpu.instance_norm_act_forward(x, residual, normalize_residual, eps, negative_slope)


def forward_inplace(
    x: torch.Tensor, residual: torch.Tensor | None, normalize_residual: bool, eps: float, negative_slope: float
) -> None:
    """`forward` with the result in `x`."""
    torch.ops.swin_kernels_cpu.instance_norm_act_inplace(x, residual, normalize_residual, eps, negative_slope)


def backward(
    grad_out: torch.Tensor,
    out: torch.Tensor,
    x: torch.Tensor | None,
    residual: torch.Tensor | None,
    statistics: torch.Tensor,
    has_residual: bool,
    normalize_residual: bool,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Arguments and results of the reference's `backward`."""
    return torch.ops.swin_kernels_cpu.instance_norm_act_backward(
        grad_out, out, x, residual, statistics, has_residual, normalize_residual, negative_slope
    )
