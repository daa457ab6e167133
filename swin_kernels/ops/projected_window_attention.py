"""`projected_window_attention`: window attention with the layer norm and the linear layers around it inside.

Contract: ``linear(window_attention(linear(layer_norm(x), weight, bias), bias_table, ..., pad_qkv=bias), out_weight,
out_bias)``. Where a kernel takes the call, qkv, three times the size of `x`, is never written to memory, nor kept for
the backward, which projects again window by window; elsewhere those operators run one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from ..backends import Call, decline_reason, forced_name, forced_or_environment, load
from ..geometry import WindowGrid, bias_table_length
from ._library import (
    FLOATING,
    NAMESPACE,
    autocast_is_on,
    check_number,
    check_saved,
    check_tensor,
    check_volume,
    check_windows,
    define,
    implement,
    library,
    runs_definition,
)
from .layer_norm import autocast_layer_norm
from .window_attention import product_flops, window_attention

_NAME = "projected_window_attention"
_ENGINE = "cpu"
"""The one backend that has a kernel."""

_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor bias_table, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? out_weight, Tensor? out_bias, float? norm_eps, int[] window_size, int[] shift_size, float scale"
)
# The result, and what the backward needs: the attention's output where a layer comes after it, and the log-sum-exp.
define(f"{_NAME}({_INPUTS}, bool for_backward, str backend) -> (Tensor, Tensor, Tensor)")
define(
    f"{_NAME}_backward(Tensor grad_out, Tensor attended, Tensor lse, {_INPUTS}, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
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
    out_weight: torch.Tensor | None = None,
    out_bias: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Normalise a volume's tokens, project them, attend inside the volume's (shifted) windows, project the result.

    Args:
        x: ``(B, *S, C)``, two or three spatial axes.
        weight: ``(3C, C)``; rows are q, k, v, then heads, then head_dim.
        bias: ``(3C,)`` or None; padding tokens carry it.
        norm_weight, norm_bias: ``(C,)`` or None, of the layer norm.
        norm_eps: of the layer norm, which is left out if this is None.
        out_weight, out_bias: ``(C, C)`` and ``(C,)`` or None, of the linear layer after the attention, which is left
            out if `out_weight` is None.
        bias_table, window_size, shift_size, scale, backend: as in `window_attention`.

    Returns:
        ``(B, *S, C)``. Differentiable once in every tensor.

    Raises:
        TypeError, ValueError, RuntimeError: as `window_attention`; `weight`, `bias`, `norm_weight`, `norm_bias`,
            `out_weight` or `out_bias` not of the shape above, or of another dtype than `x` outside of autocast (the
            norm's may be float32) or device; `norm_eps` below 0; `out_bias` without `out_weight`.
    """
    given = (x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias)
    window, shift = _check(*given, norm_eps, window_size, shift_size)
    if scale is None:
        scale = (x.shape[-1] // bias_table.shape[1]) ** -0.5
    scale = check_number(_NAME, "scale", scale)
    tensors = [t for t in given if t is not None]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    apart = (
        runs_definition(_NAME, backend) or autocast_is_on(x.device) or len({(t.dtype, t.device) for t in tensors}) > 1
    )
    forced = forced_or_environment(forced_name(_NAME, backend))
    if forced and (reason := _unavailable(forced)):
        raise RuntimeError(f"{_NAME}: backend {forced!r} cannot run this call: {reason}")
    if apart or (differentiated and declined(x, weight, bias_table, window, forced_name(_NAME, backend), True)):
        if norm_eps is not None:
            x = autocast_layer_norm(x, norm_weight, norm_bias, norm_eps, for_linear=True)
        qkv = F.linear(x, weight, bias)  # (B, *S, 3C)
        out = window_attention(qkv, bias_table, window_size, shift_size, pad_qkv=bias, scale=scale, backend=backend)
        return _linear(out, out_weight, out_bias)  # (B, *S, C)
    out, _, _ = torch.ops.swin_kernels.projected_window_attention(
        *given, norm_eps, window, shift, scale, differentiated, forced_name(_NAME, backend)
    )
    return out


def _check(
    x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias, norm_eps, window_size, shift_size
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check the arguments of the public function but `scale`; returns nominal window and shift per axis."""
    check_tensor(_NAME, "x", x, FLOATING)
    check_volume(_NAME, "x", x)
    window, shift = check_windows(_NAME, x.dim() - 2, window_size, shift_size)
    channels = x.shape[-1]
    _check_parameter(x, "weight", weight, (3 * channels, channels))
    for name, parameter, shape in (
        ("bias", bias, (3 * channels,)),
        ("norm_weight", norm_weight, (channels,)),
        ("norm_bias", norm_bias, (channels,)),
        ("out_weight", out_weight, (channels, channels)),
        ("out_bias", out_bias, (channels,)),
    ):
        if parameter is not None:
            _check_parameter(x, name, parameter, shape)
    if out_bias is not None and out_weight is None:
        raise ValueError(f"{_NAME}: out_bias is given without out_weight; accepted is both or out_weight alone")
    if norm_eps is not None and not 0 <= check_number(_NAME, "norm_eps", norm_eps) < math.inf:
        raise ValueError(f"{_NAME}: norm_eps is {norm_eps}; accepted is a finite number ≥ 0, or None for no norm")
    _check_parameter(x, "bias_table", bias_table, None)
    if bias_table.dim() != 2 or bias_table.shape[0] != bias_table_length(window) or bias_table.shape[1] < 1:
        raise ValueError(
            f"{_NAME}: bias_table has shape {tuple(bias_table.shape)}; window_size {window} needs "
            f"({bias_table_length(window)}, heads)"
        )
    heads = bias_table.shape[1]
    if weight.shape[1] % heads:  # a constant also where the extents of x are symbols
        raise ValueError(f"{_NAME}: x has {channels} channels; with {heads} heads it must be a multiple of {heads}")
    return window, shift


_OR_FLOAT32 = ("bias_table", "norm_weight", "norm_bias")
"""Parameters that may be float32 beside a 16-bit `x`."""


def _check_parameter(x: torch.Tensor, name: str, parameter: torch.Tensor, shape: tuple[int, ...] | None) -> None:
    accepted = {x.dtype: 0, torch.float32: 0} if name in _OR_FLOAT32 else {x.dtype: 0}
    check_tensor(_NAME, name, parameter, FLOATING if autocast_is_on(x.device) else (*accepted,))
    if shape is not None and tuple(parameter.shape) != shape:
        raise ValueError(f"{_NAME}: {name} has shape {tuple(parameter.shape)}; accepted is {shape}")
    if parameter.device != x.device:
        raise ValueError(f"{_NAME}: {name} is on {parameter.device}, x on {x.device}; one device is accepted")


def _layer_norm(x, weight, bias, eps):
    return x if eps is None else F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _linear(x, weight, bias):
    return x if weight is None else F.linear(x, weight, bias)


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


@torch.compiler.assume_constant_result
def _unavailable(backend: str) -> str | None:
    return load(backend).unavailable()


def _check_results(grad_out, attended, lse, x, bias_table) -> None:
    """Check what the backward is given beside the arguments of the forward."""
    for name, tensor, shape, dtype in (
        ("grad_out", grad_out, x.shape, x.dtype),
        ("attended", attended, x.shape, x.dtype),
        ("lse", lse, (*x.shape[:-1], bias_table.shape[1]), _lse_dtype(x)),
    ):
        check_saved(f"{_NAME}_backward", name, tensor, shape, (dtype,), x)


def _lse_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _forward(
    x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias, norm_eps, window, shift, scale,
    for_backward, backend,
):  # fmt: skip
    _check(x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias, norm_eps, window, shift)
    if declined(x, weight, bias_table, window, backend, backward=for_backward) is None:
        grid = WindowGrid.of(x.shape[1:-1], window, shift)
        inputs = _contiguous(x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias)
        return load(_ENGINE).projected_window_attention.forward(*inputs, norm_eps, grid, scale, for_backward)
    qkv = F.linear(_layer_norm(x, norm_weight, norm_bias, norm_eps), weight, bias)
    nothing = x.new_empty((0,))
    if not for_backward:
        out = window_attention(qkv, bias_table, window, shift, pad_qkv=bias, scale=scale, backend=backend or None)
        return _linear(out, out_weight, out_bias), nothing, x.new_empty((0,), dtype=_lse_dtype(x))
    # Where a graph was traced beside a kernel that this machine has not.
    out, lse = torch.ops.swin_kernels.window_attention(qkv, bias_table, bias, None, window, shift, scale, 0.0, backend)
    return (out, nothing, lse) if out_weight is None else (F.linear(out, out_weight, out_bias), out, lse)


def _backward(
    grad_out, attended, lse, x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias, norm_eps,
    window, shift, scale, backend,
):  # fmt: skip
    _check(x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias, norm_eps, window, shift)
    _check_results(grad_out, attended, lse, x, bias_table)
    if declined(x, weight, bias_table, window, backend, backward=True) is None:
        grid = WindowGrid.of(x.shape[1:-1], window, shift)
        inputs = _contiguous(
            grad_out, attended, lse, x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias
        )
        return load(_ENGINE).projected_window_attention.backward(*inputs, norm_eps, grid, scale)
    channels = x.shape[-1]
    grad_out_weight, grad_out_bias = x.new_zeros(channels, channels), x.new_zeros(channels)
    if out_weight is not None:
        grad_rows = grad_out.flatten(0, -2)
        grad_out_weight, grad_out_bias = grad_rows.mT @ attended.flatten(0, -2), grad_rows.sum(0)
        grad_out = grad_out @ out_weight
    rows = x
    if norm_eps is not None:
        rows, mean, inverse_deviation = torch.native_layer_norm(x, [channels], norm_weight, norm_bias, norm_eps)
    grad_qkv, grad_bias_table, grad_padding = torch.ops.swin_kernels.window_attention_backward(
        *(grad_out, F.linear(rows, weight, bias), bias_table, bias, None, attended, lse),
        *(window, shift, scale, 0.0, backend),
    )
    grad_x = grad_qkv @ weight
    grad_norm_weight, grad_norm_bias = x.new_zeros(channels), x.new_zeros(channels)
    if norm_eps is not None:
        ones = norm_weight if norm_weight is not None else x.new_ones(channels)  # None would leave its gradient out
        zeros = norm_bias if norm_bias is not None else x.new_zeros(channels)
        grad_x, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
            grad_x, x.contiguous(), [channels], mean, inverse_deviation, ones, zeros, [True] * 3
        )
    grad_rows = grad_qkv.flatten(0, -2)
    grad_weight, grad_bias = grad_rows.mT @ rows.flatten(0, -2), grad_rows.sum(0) + grad_padding
    grads = grad_x, grad_weight, grad_bias, grad_bias_table, grad_norm_weight, grad_norm_bias
    return *grads, grad_out_weight, grad_out_bias


implement(_NAME, _forward)
implement(f"{_NAME}_backward", _backward)


@torch.library.register_fake(f"{NAMESPACE}::{_NAME}", lib=library)
def _(
    x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias, norm_eps, window, shift, scale,
    for_backward, backend,
):  # fmt: skip
    _check(x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias, norm_eps, window, shift)
    attended_shape = x.shape if for_backward and out_weight is not None else (0,)
    lse_shape = (*x.shape[:-1], bias_table.shape[1]) if for_backward else (0,)
    return x.new_empty(x.shape), x.new_empty(attended_shape), x.new_empty(lse_shape, dtype=_lse_dtype(x))


@torch.library.register_fake(f"{NAMESPACE}::{_NAME}_backward", lib=library)
def _(grad_out, attended, lse, x, weight, bias, bias_table, *rest):
    _check(x, weight, bias, bias_table, *rest[:-2])
    _check_results(grad_out, attended, lse, x, bias_table)
    channels = x.shape[-1]
    shapes = x.shape, weight.shape, (3 * channels,), bias_table.shape, (channels,), (channels,)
    return tuple(x.new_empty(shape) for shape in (*shapes, (channels, channels), (channels,)))


_TENSORS = 8


def _setup_context(ctx, inputs, output):
    tensors, (*ctx.settings, _, ctx.backend) = inputs[:_TENSORS], inputs[_TENSORS:]
    out, attended, lse = output
    ctx.mark_non_differentiable(attended, lse)
    ctx.set_materialize_grads(False)  # no zeros the size of a volume for what has no gradient
    ctx.save_for_backward(out if tensors[6] is None else attended, lse, *tensors)


def _autograd_backward(ctx, grad_out, grad_attended, grad_lse):
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    grads = torch.ops.swin_kernels.projected_window_attention_backward(
        grad_out, *ctx.saved_tensors, *ctx.settings, ctx.backend
    )
    wanted = zip(grads, ctx.needs_input_grad[:_TENSORS], strict=True)
    return *(grad if needed else None for grad, needed in wanted), *[None] * (len(ctx.needs_input_grad) - _TENSORS)


torch.library.register_autograd(f"{NAMESPACE}::{_NAME}", _autograd_backward, setup_context=_setup_context, lib=library)


def _second_backward(ctx, *grads):
    raise RuntimeError(f"{_NAME}: differentiable once; a second derivative was asked for (create_graph=True)")


torch.library.register_autograd(f"{NAMESPACE}::{_NAME}_backward", _second_backward, lib=library)


@register_flop_formula(getattr(torch.ops.swin_kernels, _NAME))
def _forward_flops(x_shape, *args, out_shape=None) -> int:
    return _flops(x_shape, args, layer_products=1, attention_products=2)


@register_flop_formula(getattr(torch.ops.swin_kernels, f"{_NAME}_backward"))
def _backward_flops(grad_shape, attended_shape, lse_shape, x_shape, *args, out_shape=None) -> int:
    # The gradients of a layer's input and weight. Before them qkv is projected again, from which attention has five.
    again = 2 * math.prod(x_shape) * args[0][0]
    return again + _flops(x_shape, args, layer_products=2, attention_products=5)


def _flops(x_shape, rest, layer_products: int, attention_products: int) -> int:
    weight_shape, out_weight_shape, (window, shift) = rest[0], rest[5], rest[8:10]
    columns = weight_shape[0] + (0 if out_weight_shape is None else out_weight_shape[0])
    qkv_shape = (*x_shape[:-1], weight_shape[0])
    return layer_products * 2 * math.prod(x_shape) * columns + attention_products * product_flops(
        qkv_shape, window, shift
    )
