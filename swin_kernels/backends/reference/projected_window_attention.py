"""Layer norm, linear layer, window attention and linear layer, one after the other. Volumes are ``(B, *S, C)``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ...geometry import WindowGrid
from . import layer_norm, window_attention


class Layers:
    """The layers, over kernels of two operators.

    Attributes:
        attention: a kernel of `window_attention`.
        norm: a kernel of `layer_norm`.
    """

    def __init__(self, attention: Any, norm: Any) -> None:
        self.attention = attention
        self.norm = norm

    def forward(
        self,
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
        """``(B, *S, C)``; for a backward also the input of `out_weight` and the scores' log-sum-exp ``(B, *S, heads)``.

        A result that is not wanted, or that is the output itself, is ``(0,)``.
        """
        qkv = F.linear(self._normalized(x, norm_weight, norm_bias, norm_eps), weight, bias)  # (B, *S, 3C)
        attended, lse = self.attention.forward(qkv, bias_table, bias, None, grid, scale, 0.0)
        nothing = attended.new_empty((0,))
        out = attended if out_weight is None else F.linear(attended, out_weight, out_bias)
        if not for_backward:
            return out, nothing, lse.new_empty((0,))
        return out, nothing if out_weight is None else attended, lse

    def backward(
        self,
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
        """Gradients of `x`, `weight`, `bias`, `bias_table`, and weight and bias of norm and output, given or not."""
        channels = x.shape[-1]
        grad_out_weight, grad_out_bias = x.new_zeros(channels, channels), x.new_zeros(channels)
        if out_weight is not None:
            grad_out_weight, grad_out_bias = _of_layer(grad_out, attended)
            grad_out = grad_out @ out_weight
        rows = self._normalized(x, norm_weight, norm_bias, norm_eps)
        qkv = F.linear(rows, weight, bias)
        grad_qkv, grad_bias_table, grad_padding = self.attention.backward(
            grad_out, qkv, bias_table, bias, None, attended, lse, grid, scale, 0.0
        )
        grad_weight, grad_bias = _of_layer(grad_qkv, rows)
        grad_x = grad_qkv @ weight
        grad_norm_weight, grad_norm_bias = x.new_zeros(channels), x.new_zeros(channels)
        if norm_eps is not None:
            grad_x, *of_norm = self.norm.backward(grad_x, x, norm_weight, norm_eps)
            like = (x if parameter is None else parameter for parameter in (norm_weight, norm_bias))
            grad_norm_weight, grad_norm_bias = (g.to(p.dtype) for g, p in zip(of_norm, like, strict=True))
        grads = grad_x, grad_weight, grad_bias + grad_padding, grad_bias_table, grad_norm_weight, grad_norm_bias
        return *grads, grad_out_weight, grad_out_bias

    def _normalized(self, x, weight, bias, eps) -> torch.Tensor:
        return x if eps is None else self.norm.forward(x, weight, bias, eps, x.dtype)


def _of_layer(grad_out: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a linear layer's weight and bias."""
    rows = grad_out.flatten(0, -2)
    return rows.mT @ x.flatten(0, -2), rows.sum(0)


_layers = Layers(window_attention, layer_norm)
forward, backward = _layers.forward, _layers.backward
