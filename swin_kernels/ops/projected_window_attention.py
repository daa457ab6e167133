"""`projected_window_attention`: window attention with the layer norm and the linear layers around it inside.

Contract: ``linear(window_attention(linear(layer_norm(x), weight, bias), bias_table, ..., pad_qkv=bias), out_weight,
out_bias)``. A kernel neither writes qkv, three times the size of `x`, to memory, nor keeps it for the backward, which
projects again window by window. Where no backend has such a kernel, and none is forced, the layers and
`window_attention` run one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..backends import Call
from ..backends.reference.projected_window_attention import Layers
from ..geometry import WindowGrid, bias_table_length
from ._checks import (
    FLOATING,
    autocast_is_on,
    check_number,
    check_saved,
    check_tensor,
    check_volume,
    check_windows,
)
from ._operator import Example, Operator, Pass
from .layer_norm import autocast_layer_norm
from .window_attention import product_flops

_NAME = "projected_window_attention"
_TENSORS = 8
"""The number of tensors, which are the first arguments of the operator."""


@dataclass(frozen=True, kw_only=True)
class ProjectedWindowAttentionCall(Call):
    """A call of `projected_window_attention`.

    Attributes:
        heads: attention heads.
        head_dim: channels of a head.
        window: window size after clipping.
        mixed: whether a parameter has another dtype than `x`.
    """

    operator = kernel = _NAME
    heads: int
    head_dim: int
    window: tuple[int, ...]
    mixed: bool = False


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
    arguments = _prepare(
        *(x, weight, bias, bias_table, window_size, shift_size),
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=norm_eps,
        out_weight=out_weight,
        out_bias=out_bias,
        scale=scale,
    )
    return _OPERATOR(arguments, backend)[0]


def _prepare(
    x, weight, bias, bias_table, window_size, shift_size=0, *, norm_weight=None, norm_bias=None, norm_eps=None,
    out_weight=None, out_bias=None, scale=None,
) -> tuple:  # fmt: skip
    given = (x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias)
    mixed = isinstance(x, torch.Tensor) and autocast_is_on(x.device)
    window, shift = _check(*given, norm_eps, window_size, shift_size, mixed)
    if scale is None:
        scale = (x.shape[-1] // bias_table.shape[1]) ** -0.5
    scale = check_number(_NAME, "scale", scale)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    return *given, norm_eps, window, shift, scale, differentiated


def _check(
    x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias, norm_eps, window_size, shift_size,
    mixed: bool = False,
) -> tuple[tuple[int, ...], tuple[int, ...]]:  # fmt: skip
    """Check the arguments of the public function but `scale`; returns nominal window and shift per axis.

    Mixed dtypes are accepted where autocast is about to cast them.
    """
    check_tensor(_NAME, "x", x, FLOATING)
    check_volume(_NAME, "x", x)
    window, shift = check_windows(_NAME, x.dim() - 2, window_size, shift_size)
    channels = x.shape[-1]
    _check_parameter(x, "weight", weight, (3 * channels, channels), mixed)
    for name, parameter, shape in (
        ("bias", bias, (3 * channels,)),
        ("norm_weight", norm_weight, (channels,)),
        ("norm_bias", norm_bias, (channels,)),
        ("out_weight", out_weight, (channels, channels)),
        ("out_bias", out_bias, (channels,)),
    ):
        if parameter is not None:
            _check_parameter(x, name, parameter, shape, mixed)
    if out_bias is not None and out_weight is None:
        raise ValueError(f"{_NAME}: out_bias is given without out_weight; accepted is both or out_weight alone")
    if norm_eps is not None and not 0 <= check_number(_NAME, "norm_eps", norm_eps) < math.inf:
        raise ValueError(f"{_NAME}: norm_eps is {norm_eps}; accepted is a finite number ≥ 0, or None for no norm")
    _check_parameter(x, "bias_table", bias_table, None, mixed)
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
"""Parameters that may be float32 with a 16-bit `x`."""


def _check_parameter(
    x: torch.Tensor, name: str, parameter: torch.Tensor, shape: tuple[int, ...] | None, mixed: bool
) -> None:
    accepted = {x.dtype: 0, torch.float32: 0} if name in _OR_FLOAT32 else {x.dtype: 0}
    check_tensor(_NAME, name, parameter, FLOATING if mixed else (*accepted,))
    if shape is not None and tuple(parameter.shape) != shape:
        raise ValueError(f"{_NAME}: {name} has shape {tuple(parameter.shape)}; accepted is {shape}")
    if parameter.device != x.device:
        raise ValueError(f"{_NAME}: {name} is on {parameter.device}, x on {x.device}; one device is accepted")


def _check_raw(
    x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias, norm_eps, window, shift, *_
) -> None:
    _check(x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias, norm_eps, window, shift)


def _check_backward(grad_out, attended, lse, x, weight, bias, bias_table, *rest) -> None:
    _check_raw(x, weight, bias, bias_table, *rest)
    for name, tensor, shape, dtype in (
        ("grad_out", grad_out, x.shape, x.dtype),
        ("attended", attended, x.shape, x.dtype),
        ("lse", lse, (*x.shape[:-1], bias_table.shape[1]), _lse_dtype(x)),
    ):
        check_saved(f"{_NAME}_backward", name, tensor, shape, (dtype,), x)


def _lse_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _call(x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias, norm_eps, window, shift, scale,
          for_backward) -> Call:  # fmt: skip
    heads, parameters = bias_table.shape[1], (weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias)
    return ProjectedWindowAttentionCall(
        device=x.device.type,
        dtype=x.dtype,
        backward=for_backward,  # only the same kernel can use what the forward keeps
        heads=heads,
        head_dim=weight.shape[1] // heads,
        window=WindowGrid.clip(x.shape[1:-1], window),
        mixed=any(p is not None and p.dtype != x.dtype for p in parameters),
    )


def _call_backward(grad_out, attended, lse, *arguments) -> Call:
    return _call(*(*arguments, True))


def _forward(kernel, x, *arguments):
    *parameters, norm_eps, window, shift, scale, for_backward = arguments
    return kernel.forward(x, *parameters, norm_eps, WindowGrid.of(x.shape[1:-1], window, shift), scale, for_backward)


def _backward(kernel, grad_out, attended, lse, x, *arguments):
    *parameters, norm_eps, window, shift, scale = arguments
    grid = WindowGrid.of(x.shape[1:-1], window, shift)
    return kernel.backward(grad_out, attended, lse, x, *parameters, norm_eps, grid, scale)


class _AttentionOperator:
    """`window_attention` as the operator, which chooses a backend, in the form of a kernel."""

    @staticmethod
    def forward(qkv, bias_table, pad_qkv, seed, grid, scale, dropout_p):
        arguments = qkv, bias_table, pad_qkv, seed, grid.nominal, grid.shift, scale, dropout_p
        return torch.ops.swin_kernels.window_attention(*arguments, "")

    @staticmethod
    def backward(grad_out, qkv, bias_table, pad_qkv, seed, out, lse, grid, scale, dropout_p):
        tensors = grad_out, qkv, bias_table, pad_qkv, seed, out, lse
        return torch.ops.swin_kernels.window_attention_backward(
            *tensors, grid.nominal, grid.shift, scale, dropout_p, ""
        )


class _NormOperator:
    """`layer_norm` likewise."""

    @staticmethod
    def forward(x, weight, bias, eps, dtype):
        return torch.ops.swin_kernels.layer_norm(x, weight, bias, eps, dtype, "")

    @staticmethod
    def backward(grad_out, x, weight, eps):
        # Of a parameter that is None, the operator leaves out the gradient. Of the bias it takes the dtype alone.
        ones = x.new_ones(x.shape[-1:], dtype=torch.promote_types(x.dtype, torch.float32))
        return torch.ops.swin_kernels.layer_norm_backward(
            grad_out, x, ones if weight is None else weight, ones, eps, ""
        )


_OF_OPERATORS = Layers(_AttentionOperator, _NormOperator)
"""A graph may have been traced for a kernel that this machine does not have: the operators may have theirs here."""


def _fake(x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias, norm_eps, window, shift, scale,
          for_backward):  # fmt: skip
    attended_shape = x.shape if for_backward and out_weight is not None else (0,)
    lse_shape = (*x.shape[:-1], bias_table.shape[1]) if for_backward else (0,)
    return x.new_empty(x.shape), x.new_empty(attended_shape), x.new_empty(lse_shape, dtype=_lse_dtype(x))


def _fake_backward(grad_out, attended, lse, *arguments):
    x, weight, _, bias_table, norm_weight, norm_bias = arguments[:6]
    channels = x.shape[-1]
    shapes = x.shape, weight.shape, (3 * channels,), bias_table.shape, (channels,), (channels,)
    dtypes = *(x.dtype,) * 3, bias_table.dtype, _or(norm_weight, x).dtype, _or(norm_bias, x).dtype
    of_inputs = (x.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    return *of_inputs, x.new_empty((channels, channels)), x.new_empty((channels,))


def _or(parameter: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return x if parameter is None else parameter


def _saved(arguments, results):
    out, attended, lse = results
    return out if arguments[6] is None else attended, lse, *arguments[:-1]


def _autocast(dtype, x, weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias, norm_eps, *rest):
    """The layers' tensors in the autocast dtype; the norm before them in float32, as autocast has it."""
    given = weight, bias, bias_table, norm_weight, norm_bias, out_weight, out_bias
    if x.dtype == torch.float64:
        return x, *given, norm_eps, *rest
    if norm_eps is not None:
        x = autocast_layer_norm(x, norm_weight, norm_bias, norm_eps, for_linear=True)
    x, weight, bias, out_weight, out_bias = (
        None if t is None else t.to(dtype) for t in (x, weight, bias, out_weight, out_bias)
    )
    bias_table = bias_table if bias_table.dtype == dtype else bias_table.float()
    return x, weight, bias, bias_table, None, None, out_weight, out_bias, None, *rest


def _forward_flops(x_shape, *rest) -> int:
    return _flops(x_shape, rest, layer_products=1, attention_products=2)


def _backward_flops(grad_shape, attended_shape, lse_shape, x_shape, *rest) -> int:
    # Gradients of each layer's input and weight; before them, qkv is projected again, for the five of the attention.
    again = 2 * math.prod(x_shape) * rest[0][0]
    return again + _flops(x_shape, rest, layer_products=2, attention_products=5)


def _flops(x_shape, rest, layer_products: int, attention_products: int) -> int:
    weight_shape, out_weight_shape, (window, shift) = rest[0], rest[5], rest[8:10]
    columns = weight_shape[0] + (0 if out_weight_shape is None else out_weight_shape[0])
    qkv_shape = (*x_shape[:-1], weight_shape[0])
    return layer_products * 2 * math.prod(x_shape) * columns + attention_products * product_flops(
        qkv_shape, window, shift
    )


def _example(
    name: str,
    spatial: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    heads: int,
    head_dim: int,
    around: bool = True,
) -> Example:
    """A call; with `around`, the layer norm before it and the linear layer after it are included."""
    channels = heads * head_dim
    shapes = {
        "x": (1, *spatial, channels),
        "weight": (3 * channels, channels),
        "bias": (3 * channels,),
        "bias_table": (bias_table_length(window), heads),
    }
    if around:
        shapes |= {"norm_weight": (channels,), "norm_bias": (channels,)}
        shapes |= {"out_weight": (channels, channels), "out_bias": (channels,)}
    return Example(name, shapes, {"window_size": window, "shift_size": shift} | ({"norm_eps": 1e-5} if around else {}))


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor bias_table, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? out_weight, Tensor? out_bias, float? norm_eps, int[] window_size, int[] shift_size, float scale"
)

_OPERATOR = Operator(
    public=projected_window_attention,
    summary="`x (B, *S, C)` → same: `window_attention` with the layer norm and the linear layers around it inside, so "
    "that qkv is never written; a kernel on the CPU",
    call_type=ProjectedWindowAttentionCall,
    prepare=_prepare,
    # Returns the result and, for a backward, the attention's output if a layer comes after it, and the log-sum-exp.
    forward=Pass(
        f"({_ARGUMENTS}, bool for_backward) -> (Tensor, Tensor, Tensor)",
        check=_check_raw,
        call=_call,
        run=_forward,
        composed=_OF_OPERATORS,
        fake=_fake,
        flops=_forward_flops,
    ),
    backward=Pass(
        f"(Tensor grad_out, Tensor attended, Tensor lse, {_ARGUMENTS}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        check=_check_backward,
        call=_call_backward,
        run=_backward,
        composed=_OF_OPERATORS,
        fake=_fake_backward,
        flops=_backward_flops,
    ),
    saved=_saved,
    differentiable=tuple(range(_TENSORS)),
    autocast=_autocast,
    examples=(
        _example("3D, padded, shifted", (9, 8, 7), (7, 7, 7), (3, 3, 3), heads=3, head_dim=16),
        _example("3D, pads one axis, clips one", (3, 9, 8), (4, 4, 4), (2, 2, 2), heads=1, head_dim=16, around=False),
        _example("2D, padded, shifted", (10, 9), (7, 7), (3, 3), heads=3, head_dim=16),
        _example("3D, odd head_dim", (5, 4, 6), (3, 2, 3), (1, 1, 0), heads=3, head_dim=5),
    ),
    timed={
        "cpu": _example("12³ tokens, window 7³", (12,) * 3, (7,) * 3, (3,) * 3, heads=3, head_dim=16),
        "cuda": _example("48³ tokens, window 7³", (48,) * 3, (7,) * 3, (3,) * 3, heads=3, head_dim=16),
    },
)
