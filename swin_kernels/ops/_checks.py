"""The argument checks that operators share."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TypeGuard

import torch

LARGEST_INT = 2**63 - 1
"""Integers of an operator's schema have 64 bits."""

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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


def _is_int(value: object) -> TypeGuard[int]:
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


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is on for `device`; some devices, such as "meta", have no autocast."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def check_tensor(operator: str, name: str, value: object, dtypes: Sequence[torch.dtype] = ()) -> torch.Tensor:
    """`value`; raises `TypeError` unless it is a dense tensor of one of `dtypes` (any if empty)."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{operator}: {name} is a {type(value).__name__}; accepted is a torch.Tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{operator}: {name} has layout {value.layout}; accepted is torch.strided")
    if dtypes and value.dtype not in dtypes:
        accepted = ", ".join(str(d) for d in dtypes)
        raise TypeError(f"{operator}: {name} has dtype {value.dtype}; accepted are {accepted}")
    return value


def check_saved(
    operator: str, name: str, value: object, shape: Sequence[int], dtypes: Sequence[torch.dtype], like: torch.Tensor
) -> None:
    """Check what a backward gets besides the arguments of the forward: a gradient, or what the forward returned.

    Args:
        like: a tensor on the accepted device.

    Raises:
        TypeError: not a dense tensor of one of `dtypes`.
        ValueError: another shape or device.
    """
    tensor = check_tensor(operator, name, value, dtypes)
    if tensor.shape != tuple(shape) or tensor.device != like.device:
        raise ValueError(
            f"{operator}: {name} has shape {tuple(tensor.shape)} on {tensor.device}; accepted is {tuple(shape)} on "
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
