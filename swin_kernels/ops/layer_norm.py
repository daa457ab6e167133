"""`layer_norm`: the norm over channels, rounded once to the dtype that its consumer computes in.

Contract: ``y = (x − mean) / sqrt(variance + eps) · weight + bias``, mean and (biased) variance over the last axis, in
float32 (float64 for float64), then rounded to `dtype`. Under autocast PyTorch's norm runs in float32 and the linear
layer after it casts: `x` is written in float32, read, the result written in float32, read, and written in 16 bits.
Here it is read once and written once, with the same values. Source: Ba et al., "Layer Normalization",
https://arxiv.org/abs/1607.06450.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..backends import Call
from ._checks import FLOATING, autocast_is_on, check_number, check_saved, check_tensor
from ._operator import Example, Operator, Pass, has_kernel

MOST_CHANNELS = 2**14
"""A program of the GPU kernel holds all channels of a row, so there is a limit."""

_NAME = "layer_norm"


@dataclass(frozen=True, kw_only=True)
class LayerNormCall(Call):
    """A call of `layer_norm`."""

    operator = kernel = _NAME


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
        ValueError: shapes or devices that do not match, `eps` out of range, unknown backend.
    """
    return _OPERATOR(_prepare(x, weight, bias, eps, dtype=dtype), backend)


def _prepare(x, weight=None, bias=None, eps=1e-5, *, dtype=None) -> tuple:
    dtype = x.dtype if dtype is None and isinstance(x, torch.Tensor) else dtype
    _check(x, weight, bias, eps, dtype)
    return x, weight, bias, float(eps), dtype


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
        for_linear: whether only linear layers use the result. Under autocast it may then have the dtype to which they
            would cast it, instead of float32.
    """
    if not autocast_is_on(x.device) or x.shape[-1] > MOST_CHANNELS:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if has_kernel(_NAME, device=x.device.type, dtype=x.dtype):
        dtype = torch.get_autocast_dtype(x.device.type) if for_linear else torch.float32
        return layer_norm(x, weight, bias, eps, dtype=dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _check_backward(grad_out, x, weight, bias, eps) -> None:
    _check(x, weight, bias, eps, x.dtype)
    check_saved(f"{_NAME}_backward", "grad_out", grad_out, x.shape, FLOATING, x)


def _call(x, *_) -> Call:
    return LayerNormCall(device=x.device.type, dtype=x.dtype)


def _call_backward(grad_out, x, *_) -> Call:
    return LayerNormCall(device=x.device.type, dtype=x.dtype, backward=True)


def _forward(kernel, x, weight, bias, eps, dtype):
    return kernel.forward(x, weight, bias, eps, dtype)


def _backward(kernel, grad_out, x, weight, bias, eps):
    grad_x, grad_weight, grad_bias = kernel.backward(grad_out, x, weight, eps)
    return (
        grad_x,
        x.new_empty((0,)) if weight is None else grad_weight.to(weight.dtype),
        x.new_empty((0,)) if bias is None else grad_bias.to(bias.dtype),
    )


def _fake(x, weight, bias, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def _fake_backward(grad_out, x, weight, bias, eps):
    parameters = [x.new_empty((0,)) if p is None else p.new_empty(p.shape) for p in (weight, bias)]
    return x.new_empty(x.shape), *parameters


def _saved(arguments, out):
    return arguments[:-1]


def _example(name: str, *shape: int, **options) -> Example:
    return Example(name, {"x": shape, "weight": shape[-1:], "bias": shape[-1:]}, options)


_OPERATOR = Operator(
    public=layer_norm,
    summary="`(..., C)` → same: layer norm over the last axis, rounded once to the dtype that is asked for",
    call_type=LayerNormCall,
    prepare=_prepare,
    forward=Pass(
        "(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) -> Tensor",
        check=_check,
        call=_call,
        run=_forward,
        fake=_fake,
    ),
    backward=Pass(
        "(Tensor grad_out, Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
        check=_check_backward,
        call=_call_backward,
        run=_backward,
        fake=_fake_backward,
    ),
    saved=_saved,
    differentiable=(0, 1, 2),
    examples=(
        _example("a volume", 2, 5, 4, 3, 48, eps=1e-3),
        _example("few channels, many rows", 1001, 5),
        _example("one row", 130),
    ),
    timed={"cpu": _example("24³ tokens", 1, *(24,) * 3, 48), "cuda": _example("48³ tokens", 1, *(48,) * 3, 48)},
)
