"""The engines, and which of them runs a call.

Each backend is a package of this folder with the same face:

- ``unavailable() -> str | None``: why it cannot run on this machine at all, or None;
- ``supports(call) -> str | None``: why it cannot run this call, or None;
- one module per operator, named after it, whose ``forward`` and ``backward`` take the arguments of
  `reference`'s.

`select` walks a fixed order per device and takes the first backend that supports the call. The same
answers make the error when a backend is forced, the debug log, `explain` and the doctor.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

log = logging.getLogger("swin_kernels")

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""Every backend name that `backend=`, `use_backend` and ``SWIN_KERNELS_BACKEND`` accept."""

ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
"""Preference per device type; any other device runs on the reference."""

_forced: str | None = None


@dataclass(frozen=True)
class Call:
    """What a backend may need to know to accept or decline a call.

    Attributes:
        operator: name of the public function.
        device: device type.
        dtype: element type of the volume.
        head_dim: channels of a head (0 for operators without heads).
        window: window size after clipping; for convolutions, the kernel.
        dropout: whether attention dropout is on.
        backward: whether this is the gradient computation.
        heads: attention heads (0 for operators without).
        channels: of a convolution's two inputs and its output.
    """

    operator: str
    device: str
    dtype: torch.dtype
    head_dim: int
    window: tuple[int, ...]
    dropout: bool = False
    backward: bool = False
    heads: int = 0
    channels: tuple[int, ...] = ()


def load(name: str) -> ModuleType:
    """The package of backend `name`."""
    return importlib.import_module(f"{__name__}.{name}")


def _implemented() -> tuple[str, ...]:
    root = os.path.dirname(__file__)
    return tuple(name for name in BACKENDS if os.path.isfile(os.path.join(root, name, "__init__.py")))


IMPLEMENTED = _implemented()
"""The backends this build of the package has."""


def check_name(name: str, where: str) -> str:
    """`name` if it is a backend of this package; raises `ValueError` naming `where` it came from."""
    if name not in IMPLEMENTED:
        raise ValueError(f"{where}: got {name!r}; accepted are {', '.join(IMPLEMENTED)}")
    return name


def decline_reason(name: str, call: Call) -> str | None:
    """Why backend `name` cannot run `call` here, or None if it can."""
    backend = load(name)
    if reason := backend.unavailable():
        return reason
    home = "window_partition" if call.operator == "window_reverse" else call.operator
    if not hasattr(backend, home):
        return f"it has no kernel for {call.operator}"
    return backend.supports(call)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every operator onto backend `name` within the context (process-wide).

    Raises:
        ValueError: `name` is not a backend of this package.
    """
    global _forced
    previous, _forced = _forced, check_name(name, "use_backend: name")
    try:
        yield
    finally:
        _forced = previous


def forced_name(operator: str, backend: str | None) -> str:
    """The backend forced by an operator's `backend` argument or by `use_backend`; "" if the choice is free."""
    if backend is not None:
        return check_name(backend, f"{operator}: backend")
    return _forced or ""


def forced_or_environment(forced: str) -> str:
    """`forced`, or else what ``SWIN_KERNELS_BACKEND`` names; "" if neither does.

    Raises:
        ValueError: the environment names no backend.
    """
    if not forced and (from_environment := os.environ.get("SWIN_KERNELS_BACKEND", "")):
        return check_name(from_environment, "SWIN_KERNELS_BACKEND")
    return forced


@torch.compiler.assume_constant_result
def has_kernel(
    operator: str, device: str, dtype: torch.dtype, window: tuple[int, ...] = (), channels: tuple[int, ...] = ()
) -> bool:
    """Whether `operator` has a kernel here, beside the reference.

    A backend that is forced, for the attention say, and has none of this operator leaves it to PyTorch.
    """
    call = Call(operator, device, dtype, head_dim=0, window=window, channels=channels)
    if forced := forced_or_environment(forced_name(operator, None)):
        return forced != "reference" and decline_reason(forced, call) is None
    return select(call) is not load("reference")


def select(call: Call, forced: str = "") -> ModuleType:
    """The backend that runs `call`.

    Args:
        call: the call.
        forced: a backend name, or "" for the environment's ``SWIN_KERNELS_BACKEND`` or else the
            first in `ORDER` that supports the call.

    Raises:
        ValueError: the forced name is unknown.
        RuntimeError: the forced backend cannot run the call; the message says why.
    """
    forced = forced_or_environment(forced)
    if forced:
        check_name(forced, f"{call.operator}: backend")
        if reason := decline_reason(forced, call):
            raise RuntimeError(f"{call.operator}: backend {forced!r} cannot run this call: {reason}")
        return load(forced)
    declined = []
    for name in ORDER.get(call.device, ("reference",)):
        reason = decline_reason(name, call)
        if reason is None:
            log.debug("%s runs on %s%s", call, name, "".join(f"; {d}" for d in declined))
            return load(name)
        declined.append(f"{name} declined: {reason}")
    raise RuntimeError(f"{call.operator}: no backend runs this call: " + "; ".join(declined))
