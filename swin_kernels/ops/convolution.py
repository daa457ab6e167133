"""`convolution`: 3×3×3 and 1×1×1 convolutions of channels-last volumes, over a concatenation that is not written.

Contract: ``conv(cat([x, skip], 1), weight)`` with stride 1, zeros as padding that keeps the extents, no bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from ..backends import Call, forced_name, select
from ..backends.reference import convolution as definition
from ._library import (
    FLOATING,
    NAMESPACE,
    autocast_is_on,
    check_saved,
    check_tensor,
    define,
    implement,
    library,
    owned,
    runs_definition,
)

define("convolution(Tensor x, Tensor? skip, Tensor weight, str backend) -> Tensor")
define(
    "convolution_backward(Tensor grad_out, Tensor x, Tensor? skip, Tensor weight, bool[] wanted, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)

_NAME = "convolution"


def convolution(
    x: torch.Tensor, weight: torch.Tensor, skip: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """Convolve `x`, or `x` and `skip` as if their channels were one tensor's.

    The CPU kernel, for float32 in 3D, computes 3×3×3 by Winograd's F(4, 3) along the last axis: half the products, and
    an infinite input makes NaN of up to three outputs more than it would. It takes bfloat16 and float16 too, by way of
    float32, where the processor has no arithmetic for them. On GPUs there are kernels for bfloat16
    and float16 in 3D, of few input or few output channels, as the first and the last layers of Swin UNETR have them;
    gradients of weights are PyTorch's there.

    Args:
        x: ``(B, C1, *S)`` with 2 or 3 spatial axes; float32, float64, bfloat16 or float16. Channels-last memory is
            not copied.
        weight: ``(C_out, C1 + C2, k, k[, k])`` with `k` 1 or 3, dtype and device of `x`; under autocast any.
        skip: ``(B, C2, *S)``; None for none, C2 is then 0.
        backend: force a backend; None chooses.

    Returns:
        ``(B, C_out, *S)``, channels last in memory.

    Raises:
        TypeError: an argument of the wrong type, dtype or layout.
        ValueError: shapes or devices that do not belong together, unknown backend.
    """
    check_tensor(_NAME, "x", x, FLOATING)
    if autocast_is_on(x.device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, skip = (t.to(dtype) if isinstance(t, torch.Tensor) else t for t in (x, weight, skip))
    _check(x, skip, weight)
    if runs_definition(_NAME, backend):
        out = definition.forward(_rows(x), _rows(skip), weight)
        return out.movedim(-1, 1)  # (B, C_out, *S)
    return torch.ops.swin_kernels.convolution(x, skip, weight, forced_name(_NAME, backend))


def _check(x, skip, weight) -> None:
    check_tensor(_NAME, "x", x, FLOATING)
    if x.dim() not in (4, 5) or any(extent < 1 for extent in x.shape[1:]):
        raise ValueError(
            f"{_NAME}: x has shape {tuple(x.shape)}; accepted is (B, C, H, W) or (B, C, D, H, W), of which only the "
            "batch may be empty"
        )
    check_tensor(_NAME, "weight", weight, (x.dtype,))
    channels = x.shape[1]
    if skip is not None:
        check_tensor(_NAME, "skip", skip, (x.dtype,))
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


def _engine(x: torch.Tensor, skip: torch.Tensor | None, weight: torch.Tensor, backend: str, backward: bool = False):
    call = Call(
        _NAME,
        x.device.type,
        x.dtype,
        head_dim=0,
        window=tuple(weight.shape[2:]),
        backward=backward,
        channels=channels_of(x, skip, weight),
    )
    return select(call, backend).convolution


def channels_of(x: torch.Tensor, skip: torch.Tensor | None, weight: torch.Tensor) -> tuple[int, int, int]:
    """`Call.channels`: of `x`, of `skip` (0 for None) and of the output."""
    return x.shape[1], 0 if skip is None else skip.shape[1], weight.shape[0]


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """``(B, C, *S)`` to contiguous ``(B, *S, C)``: a view of a channels-last tensor, a copy of any other."""
    return None if x is None else x.movedim(1, -1).contiguous()


def _forward(x, skip, weight, backend):
    _check(x, skip, weight)
    out = _engine(x, skip, weight, backend).forward(_rows(x), _rows(skip), weight.contiguous())
    return owned(out.movedim(-1, 1))  # (B, C_out, *S)


def _check_backward(grad_out, x, skip, weight, wanted) -> None:
    operator = f"{_NAME}_backward"
    _check(x, skip, weight)
    check_saved(operator, "grad_out", grad_out, (x.shape[0], weight.shape[0], *x.shape[2:]), (x.dtype,), x)
    if len(wanted) != 3 or (wanted[1] and skip is None):
        raise ValueError(
            f"{operator}: wanted is {wanted}; accepted is whether for each of x, skip (if given) and weight"
        )


def _backward(grad_out, x, skip, weight, wanted, backend):
    _check_backward(grad_out, x, skip, weight, wanted)
    engine = _engine(x, skip, weight, backend, backward=True)
    rows = [_rows(t) for t in (grad_out, x, skip)]
    grad_x, grad_skip, grad_weight = engine.backward(*rows, weight.contiguous(), wanted)
    volumes = [x.new_empty((0,)) if g is None else g.movedim(-1, 1) for g in (grad_x, grad_skip)]  # (B, C, *S) each
    return *volumes, x.new_empty((0,)) if grad_weight is None else grad_weight


implement("convolution", _forward)
implement("convolution_backward", _backward)


def _empty_channels_last(x: torch.Tensor, channels: int) -> torch.Tensor:
    return x.new_empty((x.shape[0], *x.shape[2:], channels)).movedim(-1, 1)


@torch.library.register_fake(f"{NAMESPACE}::convolution", lib=library)
def _(x, skip, weight, backend):
    _check(x, skip, weight)
    return _empty_channels_last(x, weight.shape[0])


@torch.library.register_fake(f"{NAMESPACE}::convolution_backward", lib=library)
def _(grad_out, x, skip, weight, wanted, backend):
    _check_backward(grad_out, x, skip, weight, wanted)
    grad_x = _empty_channels_last(x, x.shape[1]) if wanted[0] else x.new_empty((0,))
    grad_skip = _empty_channels_last(skip, skip.shape[1]) if wanted[1] else x.new_empty((0,))
    return grad_x, grad_skip, weight.new_empty(weight.shape if wanted[2] else (0,))


def _setup_context(ctx, inputs, output):
    x, skip, weight, ctx.backend = inputs
    ctx.save_for_backward(x, skip, weight)


def _autograd_backward(ctx, grad_out):
    wanted = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.swin_kernels.convolution_backward(grad_out, *ctx.saved_tensors, wanted, ctx.backend)
    return *(g if asked else None for g, asked in zip(gradients, wanted, strict=True)), None


torch.library.register_autograd(
    f"{NAMESPACE}::convolution", _autograd_backward, setup_context=_setup_context, lib=library
)


def _second_backward(ctx, *grads):
    raise RuntimeError(f"{_NAME}: differentiable once; a second derivative was asked for (create_graph=True)")


torch.library.register_autograd(f"{NAMESPACE}::convolution_backward", _second_backward, lib=library)


@register_flop_formula(torch.ops.swin_kernels.convolution)
def _forward_flops(x_shape, skip_shape, weight_shape, backend, out_shape=None) -> int:
    return _product_flops(x_shape, weight_shape, weight_shape[1])


@register_flop_formula(torch.ops.swin_kernels.convolution_backward)
def _backward_flops(grad_shape, x_shape, skip_shape, weight_shape, wanted, backend, out_shape=None) -> int:
    channels = x_shape[1], 0 if skip_shape is None else skip_shape[1], weight_shape[1]
    asked = sum(count for count, asked in zip(channels, wanted, strict=True) if asked)
    return _product_flops(x_shape, weight_shape, asked)


def _product_flops(x_shape: Sequence[int], weight_shape: Sequence[int], channels: int) -> int:
    """Of the products between `channels` inputs and all outputs, as of a direct convolution."""
    return 2 * x_shape[0] * math.prod(x_shape[2:]) * weight_shape[0] * channels * math.prod(weight_shape[2:])
