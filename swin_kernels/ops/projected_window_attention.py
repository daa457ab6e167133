"""`projected_window_attention`: window attention with the layer norm and the projection to qkv before it inside.

Contract: ``window_attention(linear(layer_norm(x), weight, bias), bias_table, ..., pad_qkv=bias)``. Where a kernel takes
the call, qkv, three times the size of `x`, is never written to memory; elsewhere those operators run one after the
other. It serves inference: where a gradient is asked for, qkv is needed anyway.
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
    f"{_NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor bias_table, Tensor? norm_weight, Tensor? norm_bias, "
    "float? norm_eps, int[] window_size, int[] shift_size, float scale, str backend) -> Tensor"
)


def projected_window_attention(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bias_table: torch.Tensor,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    norm_eps: float | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Normalise a volume's tokens, project them to queries, keys and values, attend inside its (shifted) windows.

    Args:
        x: ``(B, *S, C)``, two or three spatial axes.
        weight: ``(3C, C)``; rows are q, k, v, then heads, then head_dim.
        bias: ``(3C,)`` or None; padding tokens carry it.
        norm_weight, norm_bias: ``(C,)`` or None, of the layer norm.
        norm_eps: of the layer norm, which is left out if this is None.
        bias_table, window_size, shift_size, scale, backend: as in `window_attention`.

    Returns:
        ``(B, *S, C)``. Differentiable in every tensor.

    Raises:
        TypeError, ValueError, RuntimeError: as `window_attention`; `weight`, `bias`, `norm_weight` or `norm_bias` not
            of the shape above.
    """
    check_tensor(_NAME, "x", x, FLOATING)
    check_volume(_NAME, "x", x)
    channels = x.shape[-1]
    check_tensor(_NAME, "weight", weight, FLOATING)
    if tuple(weight.shape) != (3 * channels, channels):
        raise ValueError(f"{_NAME}: weight has shape {tuple(weight.shape)}; accepted is {(3 * channels, channels)}")
    vectors = {"bias": (bias, 3 * channels), "norm_weight": (norm_weight, channels), "norm_bias": (norm_bias, channels)}
    for name, (vector, length) in vectors.items():
        if vector is not None:
            check_tensor(_NAME, name, vector, FLOATING)
            if tuple(vector.shape) != (length,):
                raise ValueError(f"{_NAME}: {name} has shape {tuple(vector.shape)}; accepted is ({length},)")
    tensors = [t for t in (x, weight, bias, bias_table, norm_weight, norm_bias) if t is not None]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if differentiated or autocast_is_on(x.device) or len({(t.dtype, t.device) for t in tensors}) > 1:
        x = _layer_norm(x, norm_weight, norm_bias, norm_eps)
        qkv = F.linear(x, weight, bias)  # (B, *S, 3C)
        return window_attention(
            qkv, bias_table, window_size, shift_size, pad_qkv=bias, scale=scale, backend=backend
        )  # (B, *S, C)
    window, shift = check_windows(_NAME, x.dim() - 2, window_size, shift_size)
    if scale is None:
        scale = (channels // bias_table.shape[1]) ** -0.5
    return torch.ops.swin_kernels.projected_window_attention(
        x,
        weight,
        bias,
        bias_table,
        norm_weight,
        norm_bias,
        norm_eps,
        window,
        shift,
        float(scale),
        forced_name(_NAME, backend),
    )


def _layer_norm(x, weight, bias, eps):
    return x if eps is None else F.layer_norm(x, x.shape[-1:], weight, bias, eps)


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


def _run(x, weight, bias, bias_table, norm_weight, norm_bias, norm_eps, window, shift, scale, backend):
    if declined(x, bias_table, window, shift, backend) is None and bias_table.shape[0] == bias_table_length(window):
        grid = WindowGrid.of(x.shape[1:-1], window, shift)
        inputs = (None if t is None else t.contiguous() for t in (x, weight, bias, bias_table, norm_weight, norm_bias))
        return load(_ENGINE).projected_window_attention.forward(*inputs, norm_eps, grid, scale)
    x = _layer_norm(x, norm_weight, norm_bias, norm_eps)
    return window_attention(
        F.linear(x, weight, bias), bias_table, window, shift, pad_qkv=bias, scale=scale, backend=backend or None
    )


library.impl(_NAME, _run, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::{_NAME}", lib=library)
def _(x, *rest):
    return x.new_empty(x.shape)
