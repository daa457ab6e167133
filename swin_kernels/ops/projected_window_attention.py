"""`projected_window_attention`: window attention with the projection to queries, keys and values inside.

Contract: ``window_attention(linear(x, weight, bias), bias_table, ..., pad_qkv=bias)``. Where a kernel takes the call,
qkv, three times the size of `x`, is never written to memory; elsewhere those two operators run one after the other. It
serves inference: where a gradient is asked for, qkv is needed anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..backends import Call, decline_reason, forced_name, forced_or_environment, load
from ..geometry import WindowGrid, bias_table_length
from ._library import FLOATING, NAMESPACE, autocast_is_on, check_tensor, check_volume, check_windows, define, library
from .window_attention import window_attention

_NAME = "projected_window_attention"
_ENGINE = "cpu"
"""The one backend that has a kernel."""

define(
    f"{_NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor bias_table, int[] window_size, int[] shift_size, "
    "float scale, str backend) -> Tensor"
)


def projected_window_attention(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bias_table: torch.Tensor,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Project a volume to queries, keys and values and attend inside its (shifted) windows.

    Args:
        x: ``(B, *S, C)``, two or three spatial axes.
        weight: ``(3C, C)``; rows are q, k, v, then heads, then head_dim.
        bias: ``(3C,)`` or None; padding tokens carry it.
        bias_table, window_size, shift_size, scale, backend: as in `window_attention`.

    Returns:
        ``(B, *S, C)``. Differentiable in every tensor.

    Raises:
        TypeError, ValueError, RuntimeError: as `window_attention`; `weight` or `bias` not of the shape above.
    """
    check_tensor(_NAME, "x", x, FLOATING)
    check_volume(_NAME, "x", x)
    channels = x.shape[-1]
    check_tensor(_NAME, "weight", weight, FLOATING)
    if tuple(weight.shape) != (3 * channels, channels):
        raise ValueError(f"{_NAME}: weight has shape {tuple(weight.shape)}; accepted is {(3 * channels, channels)}")
    if bias is not None:
        check_tensor(_NAME, "bias", bias, FLOATING)
        if tuple(bias.shape) != (3 * channels,):
            raise ValueError(f"{_NAME}: bias has shape {tuple(bias.shape)}; accepted is ({3 * channels},)")
    tensors = [t for t in (x, weight, bias, bias_table) if t is not None]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if differentiated or autocast_is_on(x.device) or len({(t.dtype, t.device) for t in tensors}) > 1:
        qkv = F.linear(x, weight, bias)  # (B, *S, 3C)
        return window_attention(
            qkv, bias_table, window_size, shift_size, pad_qkv=bias, scale=scale, backend=backend
        )  # (B, *S, C)
    window, shift = check_windows(_NAME, x.dim() - 2, window_size, shift_size)
    if scale is None:
        scale = (channels // bias_table.shape[1]) ** -0.5
    return torch.ops.swin_kernels.projected_window_attention(
        x, weight, bias, bias_table, window, shift, float(scale), forced_name(_NAME, backend)
    )


def declined(
    x: torch.Tensor, bias_table: torch.Tensor, window: Sequence[int], shift: Sequence[int], forced: str = ""
) -> str | None:
    """Why the projection runs before the attention and not inside it; None if inside."""
    forced = forced_or_environment(forced)
    if forced not in ("", _ENGINE):
        return f"backend {forced!r} has no kernel for it"
    if bias_table.dim() != 2 or bias_table.shape[1] < 1 or x.shape[-1] % bias_table.shape[1]:
        return "the heads do not divide the channels"  # window_attention says what is accepted
    grid = WindowGrid.of(x.shape[1:-1], window, shift)
    heads = bias_table.shape[1]
    call = Call(_NAME, x.device.type, x.dtype, head_dim=x.shape[-1] // heads, window=grid.window, heads=heads)
    return decline_reason(_ENGINE, call)


def _run(x, weight, bias, bias_table, window, shift, scale, backend):
    if declined(x, bias_table, window, shift, backend) is None and bias_table.shape[0] == bias_table_length(window):
        grid = WindowGrid.of(x.shape[1:-1], window, shift)
        inputs = (None if t is None else t.contiguous() for t in (x, weight, bias, bias_table))
        return load(_ENGINE).projected_window_attention.forward(*inputs, grid, scale)
    return window_attention(
        F.linear(x, weight, bias), bias_table, window, shift, pad_qkv=bias, scale=scale, backend=backend or None
    )


library.impl(_NAME, _run, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::{_NAME}", lib=library)
def _(x, weight, bias, bias_table, window, shift, scale, backend):
    return x.new_empty(x.shape)
