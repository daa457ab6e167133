"""`instance_norm_act`: instance norm, residual and LeakyReLU of a convolution block in one operator.

Contract: with ``norm(t) = (t − mean) / sqrt(variance + eps)``, mean and (biased) variance over the spatial axes of each
channel of each instance, ``y = leaky_relu(norm(x) + r)`` where ``r`` is 0, `residual`, or ``norm(residual)``. Sources:
Ulyanov et al., "Instance Normalization", https://arxiv.org/abs/1607.08022; the blocks are those of Isensee et al.,
"nnU-Net", https://arxiv.org/abs/1809.10486, as MONAI's `UnetResBlock` has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..backends import Call, forced_name
from ._checks import FLOATING, check_number, check_saved, check_tensor
from ._operator import Example, Operator, Pass, is_transformed, owned

LEAST_INVERTIBLE_SLOPE = 1e-3
"""Least slope for which the backward recovers ``norm(x)`` from the output, so that `x` need not be kept. With a flatter
one, too many digits of a 16-bit output would be lost."""

_NAME = "instance_norm_act"


@dataclass(frozen=True, kw_only=True)
class InstanceNormActCall(Call):
    """A call of `instance_norm_act`."""

    operator = kernel = _NAME


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
    """``leaky_relu(instance_norm(x) + residual)``, without the tensors in between.

    The kernels work on channels-last memory (`torch.channels_last`, `torch.channels_last_3d`); other layouts are
    copied to it and back. Without a residual, only the output and the statistics of each channel are kept for
    the backward; with one, also `x`, and `residual` if it is normalized.

    Args:
        x: ``(B, C, *S)`` with one to three spatial axes and more than one voxel; float32, float64, bfloat16 or
            float16. Statistics and arithmetic are in float32, for float64 in float64.
        residual: added before the activation, or None; of the shape, dtype and device of `x`.
        normalize_residual: add ``instance_norm(residual)`` instead.
        eps: added to the variance, ≥ 0.
        negative_slope: slope of LeakyReLU below 0, ≥ 0; 1 for no activation, 0 for ReLU.
        inplace: write the result to `x` and return it; only where no gradient is recorded.
        backend: force a backend; None chooses.

    Returns:
        ``(B, C, *S)`` in the dtype and the memory format of `x`.

    Raises:
        TypeError: an argument of the wrong type, dtype or layout.
        ValueError: shapes or devices that do not match, one element per channel, a number out of
            range, unknown backend, `inplace` where a gradient is recorded.
    """
    arguments = _prepare(x, residual, normalize_residual=normalize_residual, eps=eps, negative_slope=negative_slope)
    if not inplace:
        return _OPERATOR(arguments, backend)[0]
    if is_transformed():
        return x.copy_(_OPERATOR(arguments, backend)[0])
    _check_writable(x)
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        raise ValueError(f"{_NAME}: inplace is True, but a gradient is recorded for x or residual; use torch.no_grad()")
    torch.ops.swin_kernels.instance_norm_act_(*arguments, forced_name(_NAME, backend))
    return x


def _prepare(x, residual=None, *, normalize_residual=False, eps=1e-5, negative_slope=0.01, inplace=False) -> tuple:
    _check(x, residual, normalize_residual, eps, negative_slope)
    return x, residual, normalize_residual, float(eps), float(negative_slope)


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


def _check_in_place(x, residual, normalize_residual, eps, negative_slope) -> None:
    _check(x, residual, normalize_residual, eps, negative_slope)
    _check_writable(x)


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


def _call(x, *_) -> Call:
    return InstanceNormActCall(device=x.device.type, dtype=x.dtype)


def _call_backward(grad_out, *_) -> Call:
    return InstanceNormActCall(device=grad_out.device.type, dtype=grad_out.dtype, backward=True)


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


def _forward(kernel, x, residual, *settings):
    out, statistics = kernel.forward(_rows(x), _rows(residual), *settings)
    return owned(_volume(out, x)), statistics


def _definition(kernel, x, residual, *settings):
    out, statistics = kernel.forward(_rows(x), _rows(residual), *settings)
    return out.movedim(-1, 1), statistics  # (B, C, *S)


def _forward_in_place(kernel, x, residual, *settings) -> None:
    rows = x.movedim(1, -1)  # (B, *S, C)
    residual = None if residual is None else _rows(residual.resolve_neg())
    if rows.is_contiguous() and not rows.is_neg():
        kernel.forward_inplace(rows, residual, *settings)
        return
    out, _ = kernel.forward(rows.resolve_neg().contiguous(), residual, *settings)
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
            f"{operator}: x is None; it can be None only without a residual, and with a negative_slope of at least "
            f"{LEAST_INVERTIBLE_SLOPE} (here {negative_slope})"
        )
    dtype = torch.promote_types(out.dtype, torch.float32)
    check_saved(operator, "statistics", statistics, _statistics_shape(out, normalize_residual), (dtype,), out)


def _statistics_shape(x: torch.Tensor, normalize_residual: bool) -> tuple[int, int, int]:
    return x.shape[0], 4 if normalize_residual else 2, x.shape[1]


def _backward(kernel, grad_out, out, x, residual, *settings):
    grad_x, grad_residual = kernel.backward(*(_rows(t) for t in (grad_out, out, x, residual)), *settings)
    if grad_residual is None:
        return _volume(grad_x, out), out.new_empty((0,))
    return _volume(grad_x, out), _volume(grad_residual, out)


def _fake(x, residual, normalize_residual, eps, negative_slope):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty(_statistics_shape(x, normalize_residual), dtype=dtype)


def _fake_backward(grad_out, out, x, residual, statistics, has_residual, *_):
    return torch.empty_like(out), torch.empty_like(out) if has_residual else out.new_empty((0,))


def _saved(arguments, results):
    x, residual, normalize_residual, _, negative_slope = arguments
    out, statistics = results
    from_output = residual is None and negative_slope >= LEAST_INVERTIBLE_SLOPE
    kept = None if from_output else x, residual if normalize_residual else None
    return out, *kept, statistics, residual is not None, normalize_residual, negative_slope


def _example(name: str, shape: tuple[int, ...], residual: bool = False, **options) -> Example:
    if not residual:
        return Example(name, {"x": shape}, options)
    return Example(name, {"x": shape, "residual": shape}, options, batched=("residual",))


_ARGUMENTS = "Tensor? residual, bool normalize_residual, float eps, float negative_slope"

_OPERATOR = Operator(
    public=instance_norm_act,
    summary="`(B, C, *S)` → same: instance norm, residual (normalised too, if asked) and LeakyReLU in one operator",
    call_type=InstanceNormActCall,
    prepare=_prepare,
    forward=Pass(
        f"(Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor)",
        check=_check,
        call=_call,
        run=_forward,
        fake=_fake,
        contiguous=False,
    ),
    in_place=Pass(
        f"(Tensor(a!) x, {_ARGUMENTS}) -> ()",
        check=_check_in_place,
        call=_call,
        run=_forward_in_place,
        fake=lambda *_: None,
        contiguous=False,
    ),
    backward=Pass(
        "(Tensor grad_out, Tensor out, Tensor? x, Tensor? residual, Tensor statistics, bool has_residual, "
        "bool normalize_residual, float negative_slope) -> (Tensor, Tensor)",
        check=_check_backward,
        call=_call_backward,
        run=_backward,
        fake=_fake_backward,
        contiguous=False,
    ),
    saved=_saved,
    differentiable=(0, 1),
    definition=_definition,
    examples=(
        _example("normalized residual", (2, 5, 7, 3, 4), True, normalize_residual=True),
        _example("residual", (1, 12, 6, 5, 4), True, eps=1e-3),
        _example("no residual", (2, 3, 9, 8, 7), negative_slope=0.2),
        _example("2D, ReLU", (2, 4, 6, 5), True, negative_slope=0.0),
    ),
    timed={
        "cpu": _example("48 channels, 24³ voxels", (1, 48, *(24,) * 3), True),
        "cuda": _example("48 channels, 96³ voxels", (1, 48, *(96,) * 3), True),
    },
)
