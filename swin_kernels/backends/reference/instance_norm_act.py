"""Instance norm, residual and LeakyReLU, written out. Volumes are ``(B, *S, C)``."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, normalize_residual: bool, eps: float, negative_slope: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and per instance and channel the mean and 1 / sqrt(variance + eps) of what was normalized.

    Returns:
        ``(B, *S, C)`` in the dtype of `x`; ``(B, 2, C)``, or ``(B, 4, C)`` with a normalized residual, in float32 or
        float64.
    """
    statistics = _statistics(x, eps)  # (B, 2, C)
    total = _normalized(x, statistics)
    if residual is not None and normalize_residual:
        of_residual = _statistics(residual, eps)
        total = total + _normalized(residual, of_residual)
        statistics = torch.cat([statistics, of_residual], 1)  # (B, 4, C)
    elif residual is not None:
        total = total + residual
    return F.leaky_relu(total, negative_slope).to(x.dtype), statistics


def forward_inplace(
    x: torch.Tensor, residual: torch.Tensor | None, normalize_residual: bool, eps: float, negative_slope: float
) -> None:
    """`forward` with the result in `x`."""
    x.copy_(forward(x, residual, normalize_residual, eps, negative_slope)[0])


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
    """Gradients of `x` and of the residual (None without one).

    Args:
        grad_out, out: gradient of the output, and the output.
        x: None where ``norm(x)`` is recovered from `out`: without a residual only LeakyReLU lies between.
        residual: None unless it is normalized.
        statistics: as `forward` returned them.
        has_residual: whether there was a residual.
    """
    wide = out.to(statistics.dtype)
    grad = grad_out.to(statistics.dtype)
    grad = torch.where(wide > 0, grad, grad * negative_slope)
    normalized = torch.where(wide > 0, wide, wide / negative_slope) if x is None else _normalized(x, statistics[:, :2])
    grad_x = _norm_backward(grad, normalized, statistics[:, :2]).to(out.dtype)
    if not has_residual:
        return grad_x, None
    if residual is not None and normalize_residual:
        grad = _norm_backward(grad, _normalized(residual, statistics[:, 2:]), statistics[:, 2:])
    return grad_x, grad.to(out.dtype)


def _statistics(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Mean and 1 / sqrt(variance + eps), ``(B, 2, C)``, in float32 or float64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1, -2)  # (B, prod(S), C)
    mean = wide.mean(1)  # (B, C)
    variance = (wide - mean[:, None]).square().mean(1)  # (B, C)
    return torch.stack([mean, (variance + eps).rsqrt()], 1)


def _per_channel(values: torch.Tensor, axes: int) -> torch.Tensor:
    """``(B, C)`` to ``(B, 1, …, C)``, which broadcasts to a volume of `axes` axes."""
    return values.view(values.shape[0], *[1] * (axes - 2), values.shape[1])


def _normalized(x: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
    mean, scale = (_per_channel(s, x.dim()) for s in statistics.unbind(1))
    return (x - mean) * scale


def _norm_backward(grad: torch.Tensor, normalized: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
    axes = tuple(range(1, grad.dim() - 1))
    mean_grad = grad.mean(axes, keepdim=True)
    mean_product = (grad * normalized).mean(axes, keepdim=True)
    scale = _per_channel(statistics[:, 1], grad.dim())
    return scale * (grad - mean_grad - normalized * mean_product)
