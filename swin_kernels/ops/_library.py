"""The `torch.library` namespace of this package, and the argument checks that operators share."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence

import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from ..backends import forced_name, forced_or_environment, log

NAMESPACE = "swin_kernels"
library = torch.library.Library(NAMESPACE, "DEF")

LARGEST_INT = 2**63 - 1
"""Integers of an operator's schema have 64 bits."""

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def define(schema: str) -> None:
    """Declare an operator of the namespace; its implementation picks a backend for the device."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def per_axis(value: int | Sequence[int], axes: int, where: str) -> tuple[int, ...]:
    """`value` as one int per spatial axis.

    Raises:
        TypeError: not an int or a sequence of ints.
        ValueError: a sequence of another length than `axes`.
    """
    if _is_int(value):
        return (value,) * axes
    if not isinstance(value, Sequence) or not all(map(_is_int, value)):
        raise TypeError(f"{where} is {value!r}; accepted is an int or one int per spatial axis")
    if len(value) != axes:
        raise ValueError(f"{where} is {tuple(value)}; accepted is an int or {axes} ints, one per spatial axis")
    return tuple(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def check_windows(
    operator: str, axes: int, window_size: int | Sequence[int], shift_size: int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Nominal window and shift, one entry per axis, checked: windows ≥ 1 and 0 ≤ shift < window."""
    window = per_axis(window_size, axes, f"{operator}: window_size")
    shift = per_axis(shift_size, axes, f"{operator}: shift_size")
    if any(not 1 <= w <= LARGEST_INT for w in window):
        raise ValueError(f"{operator}: window_size is {window}; every entry must be at least 1 and fit in 64 bits")
    if any(not 0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(f"{operator}: shift_size is {shift}; every entry must be ≥ 0 and below window_size {window}")
    return window, shift


def check_number(operator: str, name: str, value: object) -> float:
    """`value` as a float; raises `TypeError` unless it is a real number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{operator}: {name} is {value!r}; accepted is a real number")
    return float(value)


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode AD is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def runs_definition(operator: str, backend: str | None) -> bool:
    """Whether `operator` runs as its definition, in PyTorch's own operators, which every transform knows.

    So it does under `is_transformed`: of an operator of `torch.library` forward-mode AD would drop the tangent without
    a word, and the transforms of `torch.func` refuse it.

    Raises:
        RuntimeError: a backend other than the reference is forced under a transform; ONNX has no such operator.
    """
    if (torch.compiler.is_exporting() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            f"{operator}: ONNX has no such operator; call swin_kernels.restore(model) before torch.onnx.export, or "
            "export the trained model with `swin-unetr export --formats onnx`"
        )
    if not is_transformed():
        return False
    forced = forced_or_environment(forced_name(operator, backend))
    if forced not in ("", "reference"):
        raise RuntimeError(
            f"{operator}: backend {forced!r} cannot run under a transform of torch.func or forward-mode AD; accepted "
            "is 'reference'"
        )
    if not torch.compiler.is_dynamo_compiling():  # which would break its graph at a line for the log
        log.debug("%s runs on its definition in PyTorch, under a transform of torch.func or forward-mode AD", operator)
    return True


def implement(operator: str, function: Callable) -> None:
    """Register `function` as `operator` of the namespace, on every device.

    Of tensors that carry a tangent of forward-mode AD the operator raises in place of losing it; the public functions
    do not call it then. A graph that was recorded before may run its backward meanwhile, in this thread or another.
    """

    @functools.wraps(function)
    def run(*args):
        if _carry_tangent(args):
            raise RuntimeError(
                f"torch.ops.{NAMESPACE}.{operator}: has no forward-mode derivative; the function of "
                "swin_kernels that wraps it has"
            )
        return function(*args)

    library.impl(operator, run, "CompositeExplicitAutograd")


def _carry_tangent(arguments: Sequence[object]) -> bool:
    """Whether a derivative in forward mode is wanted of an operator's result; `torch.func.jvp` hides the tangents."""
    if forward_ad._current_level < 0:
        return False
    if eager_transforms.JVP_NESTING > 0:
        return True
    return any(isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in arguments)


def guard_write(namespace: torch.library.Library, operator: str) -> None:
    """Tell autograd that `operator` writes to its first argument, a tensor.

    Where a gradient would be recorded for an argument the operator raises; elsewhere the tensor's version counts the
    write, so that a graph that saved it before refuses its backward. Without this PyTorch does neither.
    """
    name = f"{namespace.ns}.{operator}"

    def run(x, *rest):
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in (x, *rest)):
            raise RuntimeError(f"torch.ops.{name}: writes to x, and a gradient is recorded; use torch.no_grad()")
        with torch._C._AutoDispatchBelowAutograd():
            getattr(getattr(torch.ops, namespace.ns), operator)(x, *rest)
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)

    namespace.impl(operator, run, "Autograd")


def owned(view: torch.Tensor) -> torch.Tensor:
    """`view`, of memory that nobody else uses, as a tensor of its own, for an operator to return.

    What returns to a user as a view autograd does not let him modify in place, as activations do.
    """
    storage = view.untyped_storage()
    return view.new_empty(0).set_(storage, view.storage_offset(), view.shape, view.stride())


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is on for `device`; some, as "meta", have none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def check_tensor(operator: str, name: str, value: object, dtypes: Sequence[torch.dtype] = ()) -> None:
    """Raise `TypeError` unless `value` is a dense tensor of one of `dtypes` (any if empty)."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{operator}: {name} is a {type(value).__name__}; accepted is a torch.Tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{operator}: {name} has layout {value.layout}; accepted is torch.strided")
    if dtypes and value.dtype not in dtypes:
        accepted = ", ".join(str(d) for d in dtypes)
        raise TypeError(f"{operator}: {name} has dtype {value.dtype}; accepted are {accepted}")


def check_saved(
    operator: str, name: str, value: object, shape: Sequence[int], dtypes: Sequence[torch.dtype], like: torch.Tensor
) -> None:
    """Check what a backward is given beside the arguments of the forward: gradients, and what the forward returned.

    Args:
        like: a tensor on the accepted device.

    Raises:
        TypeError: not a dense tensor of one of `dtypes`.
        ValueError: another shape or device.
    """
    check_tensor(operator, name, value, dtypes)
    if value.shape != tuple(shape) or value.device != like.device:
        raise ValueError(
            f"{operator}: {name} has shape {tuple(value.shape)} on {value.device}; accepted is {tuple(shape)} on "
            f"{like.device}"
        )


def check_volume(operator: str, name: str, value: torch.Tensor) -> None:
    """Raise `ValueError` unless `value` is ``(B, *S, C)`` with 2 or 3 spatial axes, none of them empty."""
    if value.dim() not in (4, 5):
        raise ValueError(
            f"{operator}: {name} has shape {tuple(value.shape)}; accepted is (B, H, W, C) or (B, D, H, W, C)"
        )
    if any(extent < 1 for extent in value.shape[1:]):
        raise ValueError(f"{operator}: {name} has shape {tuple(value.shape)}; only the batch may be empty")
