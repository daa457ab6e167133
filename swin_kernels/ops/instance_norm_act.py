"""`instance_norm_act`: instance norm, residual and LeakyReLU of a convolution block in one operator.

Contract: with ``norm(t) = (t − mean) / sqrt(variance + eps)``, mean and (biased) variance over the spatial axes of each
channel of each instance, ``y = leaky_relu(norm(x) + r)`` where ``r`` is 0, `residual`, or ``norm(residual)``. Sources:
Ulyanov et al., "Instance Normalization", https://arxiv.org/abs/1607.08022; the blocks are those of Isensee et al.,
"nnU-Net", https://arxiv.org/abs/1809.10486, as MONAI's `UnetResBlock` has them.
"""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from ..backends import Call, forced_name, select
from ..backends.reference import instance_norm_act as definition
from ._library import (
    FLOATING,
    NAMESPACE,
    check_number,
    check_saved,
    check_tensor,
    define,
    guard_write,
    implement,
    library,
    owned,
    runs_definition,
)

define(
    "instance_norm_act(Tensor x, Tensor? residual, bool normalize_residual, float eps, float negative_slope, "
    "str backend) -> (Tensor, Tensor)"
)
define(
    "instance_norm_act_(Tensor(a!) x, Tensor? residual, bool normalize_residual, float eps, float negative_slope, "
    "str backend) -> ()"
)
define(
    "instance_norm_act_backward(Tensor grad_out, Tensor out, Tensor? x, Tensor? residual, Tensor statistics, "
    "bool has_residual, bool normalize_residual, float negative_slope, str backend) -> (Tensor, Tensor)"
)

LEAST_INVERTIBLE_SLOPE = 1e-3
"""From here on ``norm(x)`` is read off the output in the backward, and `x` need not be kept. With a flatter slope too
many digits of a 16-bit output would be gone."""

_NAME = "instance_norm_act"


def instance_norm_act(
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    normalize_residual: bool = False,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
    inplace: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """``leaky_relu(instance_norm(x) + residual)``, without the tensors between.

    The kernels work on channels-last memory (`torch.channels_last`, `torch.channels_last_3d`); other layouts are
    copied to it and back. Without a residual, the output is all that is kept for the backward beside one number
    per channel; with one, `x` and the output, and `residual` if it is normalized.

    Args:
        x: ``(B, C, *S)`` with one to three spatial axes of more than one element together; float32, float64, bfloat16
            or float16. Statistics and arithmetic are in float32, for float64 in float64.
        residual: added before the activation: shape, dtype and device of `x`; None for nothing.
        normalize_residual: add ``instance_norm(residual)`` in its place.
        eps: added to the variance, ≥ 0.
        negative_slope: slope of LeakyReLU below 0, ≥ 0; 1 is no activation, 0 is ReLU.
        inplace: write the result to `x` and return it; only where no gradient is recorded.
        backend: force a backend; None chooses.

    Returns:
        ``(B, C, *S)`` in the dtype and the memory format of `x`.

    Raises:
        TypeError: an argument of the wrong type, dtype or layout.
        ValueError: shapes or devices that do not belong together, one element per channel, a number out of
            range, unknown backend, `inplace` where a gradient is recorded.
    """
    _check(x, residual, normalize_residual, eps, negative_slope)
    settings = normalize_residual, float(eps), float(negative_slope)
    if runs_definition(_NAME, backend):
        rows, _ = definition.forward(_rows(x), _rows(residual), *settings)
        out = rows.movedim(-1, 1)  # (B, C, *S)
        return x.copy_(out) if inplace else out
    arguments = (x, residual, *settings, forced_name(_NAME, backend))
    if not inplace:
        return torch.ops.swin_kernels.instance_norm_act(*arguments)[0]
    _check_writable(x)
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        raise ValueError(f"{_NAME}: inplace is True, but a gradient is recorded for x or residual; use torch.no_grad()")
    torch.ops.swin_kernels.instance_norm_act_(*arguments)
    return x


def _check(x, residual, normalize_residual, eps, negative_slope) -> None:
    _check_volume(_NAME, "x", x)
    if not isinstance(normalize_residual, bool):
        raise TypeError(f"{_NAME}: normalize_residual is {normalize_residual!r}; accepted is a bool")
    if residual is not None:
        check_tensor(_NAME, "residual", residual, (x.dtype,))
        if residual.shape != x.shape:
            raise ValueError(f"{_NAME}: residual has shape {tuple(residual.shape)}; accepted is {tuple(x.shape)}")
        if residual.device != x.device:
            raise ValueError(f"{_NAME}: residual is on {residual.device}, x on {x.device}; one device is accepted")
    elif normalize_residual:
        raise ValueError(f"{_NAME}: normalize_residual is True, but residual is None")
    for name, value in (("eps", eps), ("negative_slope", negative_slope)):
        if not 0 <= check_number(_NAME, name, value) < math.inf:
            raise ValueError(f"{_NAME}: {name} is {value}; accepted is a finite number ≥ 0")


def _check_writable(x: torch.Tensor) -> None:
    if any(stride == 0 and extent > 1 for stride, extent in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"{_NAME}: inplace is True, but elements of x share memory (strides {x.stride()}); clone it")


def _check_volume(operator: str, name: str, x: torch.Tensor) -> None:
    check_tensor(operator, name, x, FLOATING)
    if x.dim() not in (3, 4, 5) or any(extent < 1 for extent in x.shape[1:]):
        raise ValueError(
            f"{operator}: {name} has shape {tuple(x.shape)}; accepted is (B, C, *S) with 1 to 3 spatial axes, of which "
            "only the batch may be empty"
        )
    if math.prod(x.shape[2:]) == 1:
        raise ValueError(f"{operator}: {name} has shape {tuple(x.shape)}; a norm needs more than 1 spatial element")


def _engine(x: torch.Tensor, backend: str, backward: bool = False):
    call = Call(_NAME, x.device.type, x.dtype, head_dim=0, window=(), backward=backward)
    return select(call, backend).instance_norm_act


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """``(B, C, *S)`` to contiguous ``(B, *S, C)``: a view of a channels-last tensor, a copy of any other."""
    return None if x is None else x.movedim(1, -1).contiguous()


def _volume(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``(B, *S, C)`` to ``(B, C, *S)`` in the memory format of `like`."""
    volume = rows.movedim(-1, 1)  # (B, C, *S)
    if like.movedim(1, -1).is_contiguous():  # then a tensor like it has its strides
        return volume.as_strided(volume.shape, like.stride())
    strides = torch.empty_like(like, device="meta").stride()
    wanted = zip(volume.shape, volume.stride(), strides, strict=True)
    if all(extent == 1 or own == other for extent, own, other in wanted):
        return volume.as_strided(volume.shape, strides)
    return torch.empty_like(like).copy_(volume)


def _forward(x, residual, normalize_residual, eps, negative_slope, backend):
    _check(x, residual, normalize_residual, eps, negative_slope)
    engine = _engine(x, backend)
    out, statistics = engine.forward(_rows(x), _rows(residual), normalize_residual, eps, negative_slope)
    return owned(_volume(out, x)), statistics


def _forward_inplace(x, residual, normalize_residual, eps, negative_slope, backend):
    _check(x, residual, normalize_residual, eps, negative_slope)
    _check_writable(x)
    engine, rows = _engine(x, backend), x.movedim(1, -1)  # (B, *S, C)
    residual = None if residual is None else _rows(residual.resolve_neg())
    if rows.is_contiguous() and not rows.is_neg():
        engine.forward_inplace(rows, residual, normalize_residual, eps, negative_slope)
        return
    out, _ = engine.forward(rows.resolve_neg().contiguous(), residual, normalize_residual, eps, negative_slope)
    rows.copy_(out)


def _check_backward(grad_out, out, x, residual, statistics, has_residual, normalize_residual, negative_slope) -> None:
    operator = f"{_NAME}_backward"
    if normalize_residual and not has_residual:
        raise ValueError(f"{operator}: normalize_residual is True, but has_residual is False")
    _check_volume(operator, "out", out)
    _check(out, residual, normalize_residual, 0.0, negative_slope)
    check_saved(operator, "grad_out", grad_out, out.shape, (out.dtype,), out)
    if x is not None:
        check_saved(operator, "x", x, out.shape, (out.dtype,), out)
    elif has_residual or negative_slope < LEAST_INVERTIBLE_SLOPE:
        raise ValueError(
            f"{operator}: x is None; it can be only without a residual, and with a negative_slope of at least "
            f"{LEAST_INVERTIBLE_SLOPE} (here {negative_slope})"
        )
    dtype = torch.promote_types(out.dtype, torch.float32)
    check_saved(operator, "statistics", statistics, _statistics_shape(out, normalize_residual), (dtype,), out)


def _statistics_shape(x: torch.Tensor, normalize_residual: bool) -> tuple[int, int, int]:
    return x.shape[0], 4 if normalize_residual else 2, x.shape[1]


def _backward(grad_out, out, x, residual, statistics, has_residual, normalize_residual, negative_slope, backend):
    _check_backward(grad_out, out, x, residual, statistics, has_residual, normalize_residual, negative_slope)
    engine = _engine(out, backend, backward=True)
    rows = [_rows(t) for t in (grad_out, out, x, residual)]
    grad_x, grad_residual = engine.backward(*rows, statistics, has_residual, normalize_residual, negative_slope)
    if grad_residual is None:
        return _volume(grad_x, out), out.new_empty((0,))
    return _volume(grad_x, out), _volume(grad_residual, out)


implement("instance_norm_act", _forward)
implement("instance_norm_act_", _forward_inplace)
implement("instance_norm_act_backward", _backward)
guard_write(library, "instance_norm_act_")
# Views that are negated lazily: PyTorch resolves them for operators that return something.
library.impl("instance_norm_act_", torch.library.fallthrough_kernel, "Negative")


@torch.library.register_fake(f"{NAMESPACE}::instance_norm_act", lib=library)
def _(x, residual, normalize_residual, eps, negative_slope, backend):
    _check(x, residual, normalize_residual, eps, negative_slope)
    statistics = x.new_empty(
        _statistics_shape(x, normalize_residual), dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return torch.empty_like(x), statistics


@torch.library.register_fake(f"{NAMESPACE}::instance_norm_act_", lib=library)
def _(x, residual, normalize_residual, eps, negative_slope, backend):
    _check(x, residual, normalize_residual, eps, negative_slope)


@torch.library.register_fake(f"{NAMESPACE}::instance_norm_act_backward", lib=library)
def _(grad_out, out, x, residual, statistics, has_residual, normalize_residual, negative_slope, backend):
    _check_backward(grad_out, out, x, residual, statistics, has_residual, normalize_residual, negative_slope)
    return torch.empty_like(out), torch.empty_like(out) if has_residual else out.new_empty((0,))


def _setup_context(ctx, inputs, output):
    x, residual, ctx.normalize_residual, _, ctx.negative_slope, ctx.backend = inputs
    out, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.has_residual = residual is not None
    from_output = residual is None and ctx.negative_slope >= LEAST_INVERTIBLE_SLOPE
    kept_residual = residual if ctx.normalize_residual else None
    ctx.save_for_backward(out, None if from_output else x, kept_residual, statistics)


def _autograd_backward(ctx, grad_out, grad_statistics):
    grad_x, grad_residual = torch.ops.swin_kernels.instance_norm_act_backward(
        grad_out, *ctx.saved_tensors, ctx.has_residual, ctx.normalize_residual, ctx.negative_slope, ctx.backend
    )
    return grad_x, grad_residual if ctx.has_residual else None, None, None, None, None


torch.library.register_autograd(
    f"{NAMESPACE}::instance_norm_act", _autograd_backward, setup_context=_setup_context, lib=library
)


def _second_backward(ctx, *grads):
    raise RuntimeError(f"{_NAME}: differentiable once; a second derivative was asked for (create_graph=True)")


torch.library.register_autograd(f"{NAMESPACE}::instance_norm_act_backward", _second_backward, lib=library)


_OPERATORS = [getattr(torch.ops.swin_kernels, _NAME + ending) for ending in ("", "_", "_backward")]


@register_flop_formula(_OPERATORS)
def _flops(*args, out_shape=None) -> int:
    return 0  # PyTorch's counter counts products of matrices alone
