"""Layer norm, written out. Rows are ``(..., C)``."""

from __future__ import annotations

import torch


def forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """The norm, in float32 or float64, rounded to `dtype`."""
    y, _ = _normalized(x, eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(dtype)


def backward(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `x`, of the weight and of the bias; those of the parameters ``(C,)`` in float32 or float64."""
    normalized, scale = _normalized(x, eps)
    grad = grad_out.to(normalized.dtype)
    rows = grad.flatten(0, -2) if grad.dim() > 1 else grad[None]  # (N, C)
    products = rows * normalized.reshape(rows.shape)
    weighted = grad if weight is None else grad * weight.to(grad.dtype)
    mean = weighted.mean(-1, keepdim=True)
    mean_product = (weighted * normalized).mean(-1, keepdim=True)
    grad_x = scale * (weighted - mean - normalized * mean_product)
    return grad_x.to(x.dtype), products.sum(0), rows.sum(0)


def _normalized(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``(x - mean) / sqrt(variance + eps)``, and the divisor's reciprocal ``(..., 1)``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    deviation = wide - wide.mean(-1, keepdim=True)
    scale = (deviation.square().mean(-1, keepdim=True) + eps).rsqrt()
    return deviation * scale, scale
