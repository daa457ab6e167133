"""`projected_window_attention`: window attention with the layer norm and the projection to qkv before it inside.

Contract: ``window_attention(linear(layer_norm(x), weight, bias), bias_table, ..., pad_qkv=bias)``. Where a kernel takes
the call, qkv, three times the size of `x`, is never written to memory, nor kept for the backward, which projects again
window by window; elsewhere those operators run one after the other.
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

_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor bias_table, Tensor? norm_weight, Tensor? norm_bias, float? norm_eps"
)
define(
    f"{_NAME}({_INPUTS}, int[] window_size, int[] shift_size, float scale, bool with_lse, str backend) "
    "-> (Tensor, Tensor)"
)
define(
    f"{_NAME}_backward(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, int[] window_size, int[] shift_size, "
    "float scale, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
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
        ``(B, *S, C)``. Differentiable once in every tensor.

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
    window, shift = check_windows(_NAME, x.dim() - 2, window_size, shift_size)
    apart = autocast_is_on(x.device) or len({(t.dtype, t.device) for t in tensors}) > 1
    if apart or (differentiated and declined(x, weight, bias_table, window, forced_name(_NAME, backend), True)):
        x = _layer_norm(x, norm_weight, norm_bias, norm_eps)
        qkv = F.linear(x, weight, bias)  # (B, *S, 3C)
        return window_attention(
            qkv, bias_table, window_size, shift_size, pad_qkv=bias, scale=scale, backend=backend
        )  # (B, *S, C)
    if scale is None:
        scale = (channels // bias_table.shape[1]) ** -0.5
    out, _ = torch.ops.swin_kernels.projected_window_attention(
        *(x, weight, bias, bias_table, norm_weight, norm_bias, norm_eps),
        *(window, shift, float(scale), differentiated, forced_name(_NAME, backend)),
    )
    return out


def _layer_norm(x, weight, bias, eps):
    return x if eps is None else F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def declined(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias_table: torch.Tensor,
    window: Sequence[int],
    forced: str = "",
    backward: bool = False,
) -> str | None:
    """Why the projection runs before the attention and not inside it; None if inside."""
    channels = weight.shape[1]  # a constant also where the extents of x are symbols
    if bias_table.dim() != 2 or bias_table.shape[1] < 1 or channels % bias_table.shape[1]:
        return "the heads do not divide the channels"  # window_attention says what is accepted
    if bias_table.shape[0] != bias_table_length(window):
        return "bias_table is not that of the window"  # as above
    heads = bias_table.shape[1]
    return _declined(x.device.type, x.dtype, channels // heads, tuple(window), heads, backward, forced)


@torch.compiler.assume_constant_result
def _declined(device, dtype, head_dim, window, heads, backward, forced) -> str | None:
    forced = forced_or_environment(forced)
    if forced not in ("", _ENGINE):
        return f"backend {forced!r} has no kernel for it"
    return decline_reason(_ENGINE, Call(_NAME, device, dtype, head_dim, window, backward=backward, heads=heads))


def _lse_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _forward(
    x, weight, bias, bias_table, norm_weight, norm_bias, norm_eps, window, shift, scale, with_lse, backend
):  # fmt: skip
    if declined(x, weight, bias_table, window, backend, backward=with_lse) is None:
        grid = WindowGrid.of(x.shape[1:-1], window, shift)
        inputs = _contiguous(x, weight, bias, bias_table, norm_weight, norm_bias)
        return load(_ENGINE).projected_window_attention.forward(*inputs, norm_eps, grid, scale, with_lse)
    qkv = F.linear(_layer_norm(x, norm_weight, norm_bias, norm_eps), weight, bias)
    if not with_lse:
        out = window_attention(qkv, bias_table, window, shift, pad_qkv=bias, scale=scale, backend=backend or None)
        return out, out.new_empty(0, dtype=_lse_dtype(x))
    # Where a graph was traced beside a kernel that this machine has not.
    return torch.ops.swin_kernels.window_attention(qkv, bias_table, bias, None, window, shift, scale, 0.0, backend)


def _backward(
    grad_out, x, weight, bias, bias_table, norm_weight, norm_bias, norm_eps, out, lse, window, shift, scale, backend
):
    if declined(x, weight, bias_table, window, backend, backward=True) is None:
        grid = WindowGrid.of(x.shape[1:-1], window, shift)
        inputs = _contiguous(grad_out, x, weight, bias, bias_table, norm_weight, norm_bias)
        return load(_ENGINE).projected_window_attention.backward(*inputs, norm_eps, out, lse, grid, scale)
    rows, channels = x, x.shape[-1:]
    if norm_eps is not None:
        rows, mean, inverse_deviation = torch.native_layer_norm(x, channels, norm_weight, norm_bias, norm_eps)
    grad_qkv, grad_bias_table, grad_padding = torch.ops.swin_kernels.window_attention_backward(
        *(grad_out, F.linear(rows, weight, bias), bias_table, bias, None, out, lse),
        *(window, shift, scale, 0.0, backend),
    )
    grad_x = grad_qkv @ weight
    grad_norm_weight = grad_norm_bias = x.new_zeros(channels)
    if norm_eps is not None:
        ones = norm_weight if norm_weight is not None else x.new_ones(channels)  # None would leave its gradient out
        zeros = norm_bias if norm_bias is not None else x.new_zeros(channels)
        grad_x, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
            grad_x, x.contiguous(), channels, mean, inverse_deviation, ones, zeros, [True] * 3
        )
    grad_rows = grad_qkv.flatten(0, -2)
    grad_weight, grad_bias = grad_rows.mT @ rows.flatten(0, -2), grad_rows.sum(0) + grad_padding
    return grad_x, grad_weight, grad_bias, grad_bias_table, grad_norm_weight.clone(), grad_norm_bias.clone()


library.impl(_NAME, _forward, "CompositeExplicitAutograd")
library.impl(f"{_NAME}_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::{_NAME}", lib=library)
def _(x, weight, bias, bias_table, norm_weight, norm_bias, norm_eps, window, shift, scale, with_lse, backend):
    lse_shape = (*x.shape[:-1], bias_table.shape[1]) if with_lse else (0,)
    return x.new_empty(x.shape), x.new_empty(lse_shape, dtype=_lse_dtype(x))


@torch.library.register_fake(f"{NAMESPACE}::{_NAME}_backward", lib=library)
def _(grad_out, x, weight, bias, bias_table, *rest):
    channels = x.shape[-1]
    shapes = x.shape, weight.shape, (3 * channels,), bias_table.shape, (channels,), (channels,)
    return tuple(x.new_empty(shape) for shape in shapes)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.norm_eps, window, shift, scale, _, backend = inputs
    out, lse = output
    ctx.settings = window, shift, scale, backend
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)


def _autograd_backward(ctx, grad_out, grad_lse):
    *tensors, out, lse = ctx.saved_tensors
    grads = torch.ops.swin_kernels.projected_window_attention_backward(
        grad_out, *tensors, ctx.norm_eps, out, lse, *ctx.settings
    )
    wanted = zip(grads, ctx.needs_input_grad, strict=False)
    return *(grad if needed else None for grad, needed in wanted), *[None] * 6


torch.library.register_autograd(f"{NAMESPACE}::{_NAME}", _autograd_backward, setup_context=_setup_context, lib=library)


def _second_backward(ctx, *grads):
    raise RuntimeError(f"{_NAME}: differentiable once; a second derivative was asked for (create_graph=True)")


torch.library.register_autograd(f"{NAMESPACE}::{_NAME}_backward", _second_backward, lib=library)
