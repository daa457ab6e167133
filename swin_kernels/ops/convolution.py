"""`convolution`: 3×3×3 and 1×1×1 convolutions of channels-last volumes, over a concatenation that is never written.

Contract: ``conv(cat([x, skip], 1), weight)`` with stride 1, zeros as padding that keeps the extents, no bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..backends import Call
from ._checks import FLOATING, autocast_is_on, check_saved, check_tensor
from ._operator import WANTED, Example, Operator, Pass, owned

_NAME = "convolution"


@dataclass(frozen=True, kw_only=True)
class ConvolutionCall(Call):
    """A call of `convolution`.

    Attributes:
        window: extents of the convolution's kernel.
        channels: of `x`, of `skip` (0 without one) and of the output.
    """

    operator = kernel = _NAME
    window: tuple[int, ...]
    channels: tuple[int, int, int]


def convolution(
    x: torch.Tensor, weight: torch.Tensor, skip: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """Convolve `x`, or `x` and `skip` as if their channels were one tensor's.

    The CPU kernel, for float32 in 3D, computes 3×3×3 by Winograd's F(4, 3) along the last axis: this halves the
    products, but an infinite input turns up to three more outputs into NaN. It also takes bfloat16 and float16, by way
    of float32, on processors without arithmetic for them. On GPUs there are kernels for bfloat16 and float16 in 3D with
    few input or few output channels, as in the first and the last layers of Swin UNETR; gradients of weights are
    PyTorch's there.

    Args:
        x: ``(B, C1, *S)`` with 2 or 3 spatial axes; float32, float64, bfloat16 or float16. Channels-last memory is
            not copied.
        weight: ``(C_out, C1 + C2, k, k[, k])`` with `k` 1 or 3, dtype and device of `x`; under autocast any dtype.
        skip: ``(B, C2, *S)``, or None; C2 is then 0.
        backend: force a backend; None chooses.

    Returns:
        ``(B, C_out, *S)``, channels last in memory.

    Raises:
        TypeError: an argument of the wrong type, dtype or layout.
        ValueError: shapes or devices that do not match, unknown backend.
    """
    return _OPERATOR(_prepare(x, weight, skip), backend)


def _prepare(x, weight, skip=None) -> tuple:
    _check(x, skip, weight, mixed=isinstance(x, torch.Tensor) and autocast_is_on(x.device))
    return x, skip, weight


def _check(x, skip, weight, mixed: bool = False) -> None:
    """Check the arguments; `mixed` dtypes are accepted where autocast is about to cast them."""
    check_tensor(_NAME, "x", x, FLOATING)
    if x.dim() not in (4, 5) or any(extent < 1 for extent in x.shape[1:]):
        raise ValueError(
            f"{_NAME}: x has shape {tuple(x.shape)}; accepted is (B, C, H, W) or (B, C, D, H, W), of which only the "
            "batch may be empty"
        )
    dtypes = FLOATING if mixed else (x.dtype,)
    check_tensor(_NAME, "weight", weight, dtypes)
    channels = x.shape[1]
    if skip is not None:
        check_tensor(_NAME, "skip", skip, dtypes)
        if skip.dim() != x.dim() or skip.shape[1] < 1 or (skip.shape[0], *skip.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise ValueError(
                f"{_NAME}: skip has shape {tuple(skip.shape)}; accepted is that of x, {tuple(x.shape)}, "
                "with any number of channels"
            )
        channels += skip.shape[1]
    kernels = [(weight.shape[0], channels, *[k] * (x.dim() - 2)) for k in (1, 3)] if weight.dim() else []
    if tuple(weight.shape) not in kernels or weight.shape[0] < 1:
        raise ValueError(
            f"{_NAME}: weight has shape {tuple(weight.shape)}; {channels} channels of x and skip need "
            f"(C_out, {channels}, k, …) with one k, 1 or 3, for each of {x.dim() - 2} axes"
        )
    for name, tensor in (("weight", weight), ("skip", skip)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{_NAME}: {name} is on {tensor.device}, x on {x.device}; one device is accepted")


def _call(x, skip, weight, backward: bool = False) -> Call:
    channels = x.shape[1], 0 if skip is None else skip.shape[1], weight.shape[0]
    return ConvolutionCall(
        device=x.device.type, dtype=x.dtype, backward=backward, window=tuple(weight.shape[2:]), channels=channels
    )


def _call_backward(grad_out, x, skip, weight, wanted) -> Call:
    return _call(x, skip, weight, backward=True)


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """``(B, C, *S)`` to contiguous ``(B, *S, C)``: a view of a channels-last tensor, a copy of any other."""
    return None if x is None else x.movedim(1, -1).contiguous()


def _forward(kernel, x, skip, weight):
    return owned(kernel.forward(_rows(x), _rows(skip), weight.contiguous()).movedim(-1, 1))  # (B, C_out, *S)


def _definition(kernel, x, skip, weight):
    return kernel.forward(_rows(x), _rows(skip), weight).movedim(-1, 1)  # (B, C_out, *S)


def _check_backward(grad_out, x, skip, weight, wanted) -> None:
    operator = f"{_NAME}_backward"
    _check(x, skip, weight)
    check_saved(operator, "grad_out", grad_out, (x.shape[0], weight.shape[0], *x.shape[2:]), (x.dtype,), x)
    if len(wanted) != 3 or (wanted[1] and skip is None):
        raise ValueError(
            f"{operator}: wanted is {wanted}; accepted is whether for each of x, skip (if given) and weight"
        )


def _backward(kernel, grad_out, x, skip, weight, wanted):
    rows = [_rows(t) for t in (grad_out, x, skip)]
    grad_x, grad_skip, grad_weight = kernel.backward(*rows, weight.contiguous(), wanted)
    volumes = [x.new_empty((0,)) if g is None else g.movedim(-1, 1) for g in (grad_x, grad_skip)]  # (B, C, *S) each
    return *volumes, x.new_empty((0,)) if grad_weight is None else grad_weight


def _empty_channels_last(x: torch.Tensor, channels: int) -> torch.Tensor:
    return x.new_empty((x.shape[0], *x.shape[2:], channels)).movedim(-1, 1)


def _fake(x, skip, weight):
    return _empty_channels_last(x, weight.shape[0])


def _fake_backward(grad_out, x, skip, weight, wanted):
    grad_x = _empty_channels_last(x, x.shape[1]) if wanted[0] else x.new_empty((0,))
    grad_skip = _empty_channels_last(skip, skip.shape[1]) if wanted[1] else x.new_empty((0,))
    return grad_x, grad_skip, weight.new_empty(weight.shape if wanted[2] else (0,))


def _saved(arguments, out):
    return *arguments, WANTED


def _autocast(dtype, x, *rest):
    if x.dtype == torch.float64:
        return x, *rest
    return tuple(None if t is None else t.to(dtype) for t in (x, *rest))


def _forward_flops(x_shape, skip_shape, weight_shape) -> int:
    return _product_flops(x_shape, weight_shape, weight_shape[1])


def _backward_flops(grad_shape, x_shape, skip_shape, weight_shape, wanted) -> int:
    channels = x_shape[1], 0 if skip_shape is None else skip_shape[1], weight_shape[1]
    asked = sum(count for count, asked in zip(channels, wanted, strict=True) if asked)
    return _product_flops(x_shape, weight_shape, asked)


def _product_flops(x_shape: Sequence[int], weight_shape: Sequence[int], channels: int) -> int:
    """FLOPs of the products between `channels` inputs and all outputs in a direct convolution."""
    return 2 * x_shape[0] * math.prod(x_shape[2:]) * weight_shape[0] * channels * math.prod(weight_shape[2:])


def _example(name: str, extents: tuple[int, ...], channels: int, skip: int, out: int, kernel: int) -> Example:
    shapes = {"x": (2, channels, *extents), "weight": (out, channels + skip, *[kernel] * len(extents))}
    if not skip:
        return Example(name, shapes)
    return Example(name, shapes | {"skip": (2, skip, *extents)}, batched=("skip",))


_OPERATOR = Operator(
    public=convolution,
    summary="`(B, C1, *S)` and `(B, C2, *S)` → `(B, C_out, *S)`, channels last in memory: 3×3×3 or 1×1×1 convolution "
    "over a concatenation that is not written; on the CPU by Winograd's F(4, 3), on GPUs of few input or few output "
    "channels",
    call_type=ConvolutionCall,
    prepare=_prepare,
    forward=Pass(
        "(Tensor x, Tensor? skip, Tensor weight) -> Tensor",
        check=_check,
        call=_call,
        run=_forward,
        fake=_fake,
        contiguous=False,
        flops=_forward_flops,
    ),
    backward=Pass(
        "(Tensor grad_out, Tensor x, Tensor? skip, Tensor weight, bool[] wanted) -> (Tensor, Tensor, Tensor)",
        check=_check_backward,
        call=_call_backward,
        run=_backward,
        fake=_fake_backward,
        contiguous=False,
        flops=_backward_flops,
    ),
    saved=_saved,
    differentiable=(0, 1, 2),
    autocast=_autocast,
    definition=_definition,
    examples=(
        _example("3×3×3 of two volumes", (5, 6, 9), 48, 48, 48, 3),
        _example("1×1×1 of two volumes", (3, 4, 7), 16, 8, 24, 1),
        _example("3×3×3 of an image", (7, 4, 6), 1, 0, 12, 3),
        _example("2D", (7, 9), 5, 0, 6, 3),
    ),
    timed={
        "cpu": _example("48 → 48 channels, 12³ voxels", (12,) * 3, 48, 0, 48, 3),
        "cuda": _example("48 + 48 → 48 channels, 48³ voxels", (48,) * 3, 48, 48, 48, 3),
    },
)
