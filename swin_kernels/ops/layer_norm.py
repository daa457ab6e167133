"""`layer_norm`: the norm over channels, rounded once to the dtype that its consumer computes in.

Contract: ``y = (x − mean) / sqrt(variance + eps) · weight + bias``, mean and (biased) variance over the last axis, in
float32 (float64 for float64), then rounded to `dtype`. Under autocast PyTorch's norm runs in float32 and the linear
layer behind it casts: `x` is written in float32, read, the result written in float32, read, and written in 16 bits.
Here it is read once and written once, to the same values. Source: Ba et al., "Layer Normalization",
https://arxiv.org/abs/1607.06450.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from ..backends import Call, forced_name, has_kernel, select
from ..backends.reference import layer_norm as definition
from ._library import (
    FLOATING,
    NAMESPACE,
    autocast_is_on,
    check_number,
    check_saved,
    check_tensor,
    define,
    implement,
    library,
    runs_definition,
)

define("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType dtype, str backend) -> Tensor")
define(
    "layer_norm_backward(Tensor grad_out, Tensor x, Tensor? weight, Tensor? bias, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)

MOST_CHANNELS = 2**14
"""A program of the GPU kernel holds all channels of a row."""

_NAME = "layer_norm"


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Layer norm over the last axis.

    Args:
        x: ``(..., C)`` with ``C`` from 1 to 16384; float32, float64, bfloat16 or float16.
        weight, bias: ``(C,)`` of any of these dtypes, or None for 1 and 0.
        eps: added to the variance, ≥ 0.
        dtype: of the result; None for that of `x`.
        backend: force a backend; None chooses.

    Returns:
        ``(..., C)``, contiguous. Differentiable once in every tensor.

    Raises:
        TypeError: an argument of the wrong type, dtype or layout.
        ValueError: shapes or devices that do not belong together, `eps` out of range, unknown backend.
    """
    dtype = x.dtype if dtype is None and isinstance(x, torch.Tensor) else dtype
    _check(x, weight, bias, eps, dtype)
    if runs_definition(_NAME, backend):
        return definition.forward(x, weight, bias, eps, dtype)
    return torch.ops.swin_kernels.layer_norm(x, weight, bias, float(eps), dtype, forced_name(_NAME, backend))


def _check(x, weight, bias, eps, dtype) -> None:
    check_tensor(_NAME, "x", x, FLOATING)
    if x.dim() < 1 or not 1 <= x.shape[-1] <= MOST_CHANNELS:
        raise ValueError(
            f"{_NAME}: x has shape {tuple(x.shape)}; accepted is (..., C) with C from 1 to {MOST_CHANNELS}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        check_tensor(_NAME, name, parameter, FLOATING)
        if parameter.shape != x.shape[-1:]:
            raise ValueError(f"{_NAME}: {name} has shape {tuple(parameter.shape)}; accepted is {tuple(x.shape[-1:])}")
        if parameter.device != x.device:
            raise ValueError(f"{_NAME}: {name} is on {parameter.device}, x on {x.device}; one device is accepted")
    if not 0 <= check_number(_NAME, "eps", eps) < math.inf:
        raise ValueError(f"{_NAME}: eps is {eps}; accepted is a finite number ≥ 0")
    if dtype not in FLOATING:
        accepted = ", ".join(str(d) for d in FLOATING)
        raise TypeError(f"{_NAME}: dtype is {dtype}; accepted are {accepted}")


def autocast_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    for_linear: bool = False,
) -> torch.Tensor:
    """PyTorch's layer norm over the last axis; under autocast by `layer_norm`, where that has a kernel.

    Args:
        x, weight, bias, eps: as in `layer_norm`.
        for_linear: the result goes to linear layers alone. Under autocast it may then have the dtype that those would
            cast it to, in place of float32.
    """
    if autocast_is_on(x.device) and x.shape[-1] <= MOST_CHANNELS and has_kernel(_NAME, x.device.type, x.dtype):
        dtype = torch.get_autocast_dtype(x.device.type) if for_linear else torch.float32
        return layer_norm(x, weight, bias, eps, dtype=dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _engine(x: torch.Tensor, backend: str, backward: bool = False):
    return select(Call(_NAME, x.device.type, x.dtype, head_dim=0, window=(), backward=backward), backend).layer_norm


def _contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _forward(x, weight, bias, eps, dtype, backend):
    _check(x, weight, bias, eps, dtype)
    return _engine(x, backend).forward(*_contiguous(x, weight, bias), eps, dtype)


def _check_backward(grad_out, x, weight, bias, eps) -> None:
    _check(x, weight, bias, eps, x.dtype)
    check_saved(f"{_NAME}_backward", "grad_out", grad_out, x.shape, FLOATING, x)


def _backward(grad_out, x, weight, bias, eps, backend):
    _check_backward(grad_out, x, weight, bias, eps)
    grad_x, grad_weight, grad_bias = _engine(x, backend, True).backward(*_contiguous(grad_out, x, weight), eps)
    nothing = x.new_empty((0,))
    return (
        grad_x,
        nothing if weight is None else grad_weight.to(weight.dtype),
        nothing.clone() if bias is None else grad_bias.to(bias.dtype),
    )


implement("layer_norm", _forward)
implement("layer_norm_backward", _backward)


@torch.library.register_fake(f"{NAMESPACE}::layer_norm", lib=library)
def _(x, weight, bias, eps, dtype, backend):
    _check(x, weight, bias, eps, dtype)
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::layer_norm_backward", lib=library)
def _(grad_out, x, weight, bias, eps, backend):
    _check_backward(grad_out, x, weight, bias, eps)
    parameters = [x.new_empty((0,)) if p is None else p.new_empty(p.shape) for p in (weight, bias)]
    return x.new_empty(x.shape), *parameters


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.eps, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias)


def _autograd_backward(ctx, grad_out):
    grads = torch.ops.swin_kernels.layer_norm_backward(grad_out, *ctx.saved_tensors, ctx.eps, ctx.backend)
    wanted = zip(grads, ctx.needs_input_grad[:3], strict=True)
    return *(grad if needed else None for grad, needed in wanted), None, None, None


torch.library.register_autograd(
    f"{NAMESPACE}::layer_norm", _autograd_backward, setup_context=_setup_context, lib=library
)


def _second_backward(ctx, *grads):
    raise RuntimeError(f"{_NAME}: differentiable once; a second derivative was asked for (create_graph=True)")


torch.library.register_autograd(f"{NAMESPACE}::layer_norm_backward", _second_backward, lib=library)


@register_flop_formula([torch.ops.swin_kernels.layer_norm, torch.ops.swin_kernels.layer_norm_backward])
def _flops(*args, out_shape=None) -> int:
    return 0  # PyTorch's counter counts products of matrices alone
