"""`toy_scale`: a tensor times a number. Contract: ``out = x · factor``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from swin_kernels.backends import Call
from swin_kernels.ops._checks import FLOATING, check_number, check_saved, check_tensor
from swin_kernels.ops._operator import Example, Operator, Pass

_NAME = "toy_scale"


@dataclass(frozen=True, kw_only=True)
class ToyScaleCall(Call):
    """A call of `toy_scale`."""

    operator = kernel = _NAME


def toy_scale(x: torch.Tensor, factor: float = 2.0, *, backend: str | None = None) -> torch.Tensor:
    """`x` times `factor`.

    Args:
        x: any shape; float32, float64, bfloat16 or float16.
        factor: a finite number.
        backend: force a backend; None chooses.
    """
    return _OPERATOR(_prepare(x, factor), backend)


def _prepare(x, factor=2.0) -> tuple:
    _check(x, factor)
    return x, float(factor)


def _check(x, factor) -> None:
    check_tensor(_NAME, "x", x, FLOATING)
    if x.dim() > 5:
        raise ValueError(f"{_NAME}: x has {x.dim()} axes; accepted are up to 5")
    if not math.isfinite(check_number(_NAME, "factor", factor)):
        raise ValueError(f"{_NAME}: factor is {factor}; accepted is a finite number")


def _check_backward(grad_out, x, factor) -> None:
    _check(x, factor)
    check_saved(f"{_NAME}_backward", "grad_out", grad_out, x.shape, (x.dtype,), x)


_OPERATOR = Operator(
    public=toy_scale,
    summary="`x` → same: times a number",
    call_type=ToyScaleCall,
    prepare=_prepare,
    forward=Pass(
        "(Tensor x, float factor) -> Tensor",
        check=_check,
        call=lambda x, factor: ToyScaleCall(device=x.device.type, dtype=x.dtype),
        run=lambda kernel, x, factor: kernel.forward(x, factor),
        fake=lambda x, factor: x.new_empty(x.shape),
    ),
    backward=Pass(
        "(Tensor grad_out, Tensor x, float factor) -> Tensor",
        check=_check_backward,
        call=lambda grad_out, x, factor: ToyScaleCall(device=x.device.type, dtype=x.dtype, backward=True),
        run=lambda kernel, grad_out, x, factor: kernel.backward(grad_out, factor),
        fake=lambda grad_out, x, factor: x.new_empty(x.shape),
    ),
    saved=lambda arguments, out: arguments,
    examples=(Example("a matrix", {"x": (5, 7)}, {"factor": 0.3}),),
    timed=dict.fromkeys(("cpu", "cuda"), Example("a large matrix", {"x": (500, 700)})),
)
