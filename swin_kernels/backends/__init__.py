"""The engines, one folder each, and which of them runs a call.

A backend is a column of the grid: a folder of this package that registers an object that implements `Backend`; nothing
else lists it. Its kernels are the modules of the folder that are named after operators. `select` asks the backends of a
device in the order of their `ranks` and takes the first that supports the call. The same answers appear in the error
for a forced backend, in the debug log, in `swin_kernels.explain` and in the doctor.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import os
import pkgutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

log = logging.getLogger("swin_kernels")

REFERENCE = "reference"
"""The backend that defines what the others compute; it runs every call."""

ENTRY_POINTS = ("forward", "backward", "forward_inplace")
"""Functions of a kernel. It has those of its twin in the reference, with the same parameters. None stands for a
backward that is never called because the backend declines every call that needs it."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a backend may need to know to accept or decline a call; each operator adds fields of its own.

    Attributes:
        operator: name of the public function.
        kernel: name of the module that a backend has for it; two operators may share one.
        device: device type.
        dtype: element type of the volume.
        backward: whether this is the gradient computation.
    """

    operator: ClassVar[str]
    kernel: ClassVar[str]
    device: str
    dtype: torch.dtype
    backward: bool = False


@runtime_checkable
class Backend(Protocol):
    """A column of the grid.

    Attributes:
        name: what `backend=`, `use_backend` and ``SWIN_KERNELS_BACKEND`` call it; its folder's name.
        summary: a line for the README: where it runs, and what it is.
        ranks: for each device type that it has kernels for, its place in the order: the lowest is asked first.
    """

    name: str
    summary: tuple[str, str]
    ranks: ClassVar[dict[str, int]]

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine at all, or None."""

    def kernel(self, name: str) -> Any:
        """The module of this name with the `ENTRY_POINTS`, or None."""

    def declines(self, call: Call) -> str | None:
        """Why it cannot run `call`, or None; asked only where it is available and has the kernel."""


class Package:
    """A `Backend` whose kernels are the modules of its own package, imported when they are first needed."""

    name: str
    summary: tuple[str, str]
    ranks: ClassVar[dict[str, int]]

    def __init__(self, package: str) -> None:
        self.package = package
        self.name = package.rpartition(".")[2]

    def unavailable(self) -> str | None:
        return None

    @functools.cache  # noqa: B019 - backends live as long as the process
    def kernel(self, name: str) -> Any:
        path = f"{self.package}.{name}"
        return importlib.import_module(path) if importlib.util.find_spec(path) else None

    def declines(self, call: Call) -> str | None:
        """The reason of the backend, or else that of its kernel's own `declines`."""
        return self.declines_any(call) or self.kernel(call.kernel).declines(call)

    def declines_any(self, call: Call) -> str | None:
        """Why it cannot run a call like this, whatever the operator."""


BACKENDS: dict[str, Backend] = {}
"""Every backend of this process, by name."""

_forced: ContextVar[str] = ContextVar("swin_kernels.use_backend", default="")


def register(backend: Backend) -> None:
    """Add a column to the grid.

    Raises:
        TypeError: `backend` does not implement `Backend`.
        ValueError: its name is already taken.
    """
    if isinstance(backend, type) or not isinstance(backend, Backend):
        raise TypeError(f"register: backend is {backend!r}; accepted is an object with the members of Backend")
    if not all(isinstance(rank, int) for rank in backend.ranks.values()):
        raise TypeError(f"register: {backend.name}.ranks is {backend.ranks!r}; accepted is an int for each device type")
    if not isinstance(backend.name, str) or not backend.name.isidentifier():
        raise ValueError(f"register: a backend's name is {backend.name!r}; accepted is an identifier")
    if backend.name in BACKENDS:
        raise ValueError(f"register: a backend {backend.name!r} is already registered")
    BACKENDS[backend.name] = backend
    order.cache_clear()


def kernel_of(backend: Backend, name: str) -> Any:
    """The kernel `name` of `backend`, checked against the reference's; None if it has none.

    Raises:
        TypeError: an entry point is missing, or has other parameters than the reference's.
    """
    kernel = backend.kernel(name)
    if kernel is not None and id(kernel) not in _CHECKED:
        _check_kernel(backend.name, name, kernel)
        _CHECKED[id(kernel)] = kernel
    return kernel


_CHECKED: dict[int, Any] = {}
"""Kernels that were checked, by id; kept alive so that no other object gets the same id."""


def _check_kernel(backend: str, name: str, kernel: Any) -> None:
    twin = BACKENDS[REFERENCE].kernel(name)
    for entry in ENTRY_POINTS:
        expected, found = getattr(twin, entry, None), getattr(kernel, entry, ...)
        if expected is None or (found is None and entry == "backward"):
            continue
        wanted = _parameters(expected)
        if not callable(found) or _parameters(found) != wanted:
            came = "missing" if found is ... else repr(found)
            raise TypeError(
                f"backend {backend!r}: {name}.{entry} is {came}; accepted is a function of "
                f"({', '.join(parameter for parameter, _ in wanted)})"
            )


def _parameters(function: Any) -> list[tuple[str, Any]]:
    return [(parameter.name, parameter.kind) for parameter in inspect.signature(function).parameters.values()]


@functools.cache
def order(device: str) -> tuple[str, ...]:
    """The backends of a device type in the order in which they are asked; the reference is the last on every device."""
    ranked = [name for name, backend in BACKENDS.items() if device in backend.ranks and name != REFERENCE]
    return (*sorted(ranked, key=lambda name: BACKENDS[name].ranks[device]), REFERENCE)


def check_name(name: str, where: str) -> str:
    """`name` if it is a backend of this process; raises `ValueError` naming `where` it came from."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{where}: got {name!r}; accepted are {', '.join(BACKENDS)}")
    return name


def decline_reason(name: str, call: Call) -> str | None:
    """Why backend `name` cannot run `call` here, or None if it can.

    Raises:
        TypeError: the backend's answer is neither a reason nor None.
    """
    backend = BACKENDS[name]
    if reason := backend.unavailable():
        return reason
    if kernel_of(backend, call.kernel) is None:
        return f"it has no kernel for {call.operator}"
    reason = backend.declines(call)
    if reason is not None and not (isinstance(reason, str) and reason):
        raise TypeError(
            f"backend {name!r}: declines gave {reason!r}; accepted are a reason, and None if it runs the call"
        )
    return reason


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every operator that is called within the context, in this thread or task, onto backend `name`.

    A gradient is computed by the backend that its forward was forced onto, wherever it is asked for. Threads that are
    started within the context, as `torch.nn.DataParallel` does, do not inherit it. A function compiled by
    `torch.compile` obeys the last context that was entered in the process.

    Raises:
        ValueError: `name` is not a backend of this package.
    """
    with _forcing(check_name(name, "use_backend: name")):
        yield


_forced_last = ""
"""What `_forced` was last set to in any thread. Dynamo cannot read a context variable; a global it can, and compiles
again when it has changed."""


@contextmanager
def _forcing(name: str) -> Iterator[None]:
    """Force the operators onto backend `name`, or leave the choice free if it is empty."""
    global _forced_last
    last, _forced_last = _forced_last, name
    compiling = torch.compiler.is_dynamo_compiling()
    before = "" if compiling else _forced.get()
    if not compiling:
        _forced.set(name)
    try:
        yield
    finally:
        _forced_last = last
        if not compiling:
            _forced.set(before)


class _Again:
    """`_forcing` as a context that can be entered any number of times."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entered: list[AbstractContextManager] = []

    def __enter__(self) -> None:
        self.entered.append(_forcing(self.name))
        self.entered[-1].__enter__()

    def __exit__(self, *error) -> None:
        self.entered.pop().__exit__(*error)


def as_forced_now() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` of `torch.utils.checkpoint`: the forward as it is, its repetitions forced, or free, as it is now.

    When autograd repeats it, `use_backend` may have ended, and on GPUs another thread does it.
    """
    return nullcontext(), _Again(_forced.get())


def forced_name(operator: str, backend: str | None) -> str:
    """The backend forced by an operator's `backend` argument or by `use_backend`; "" if the choice is free."""
    if backend is not None:
        return check_name(backend, f"{operator}: backend")
    return _forced_last if torch.compiler.is_dynamo_compiling() else _forced.get()


def forced_or_environment(forced: str) -> str:
    """`forced`, or else what ``SWIN_KERNELS_BACKEND`` names; "" if neither does.

    Raises:
        ValueError: the environment names no backend.
    """
    if not forced and (from_environment := os.environ.get("SWIN_KERNELS_BACKEND", "")):
        return check_name(from_environment, "SWIN_KERNELS_BACKEND")
    return forced


def select(call: Call, forced: str = "") -> Backend:
    """The backend that runs `call`.

    Args:
        call: the call.
        forced: a backend name, or "" for the environment's ``SWIN_KERNELS_BACKEND``, or else the first of `order`
            that supports the call.

    Raises:
        ValueError: the forced name is unknown.
        RuntimeError: the forced backend cannot run the call; the message says why.
    """
    forced = forced_or_environment(forced)
    if forced:
        check_name(forced, f"{call.operator}: backend")
        if reason := decline_reason(forced, call):
            raise RuntimeError(f"{call.operator}: backend {forced!r} cannot run this call: {reason}")
        log.debug("%s runs on %s, which is forced", call, forced)
        return BACKENDS[forced]
    declined: list[str] = []
    for name in order(call.device):
        reason = decline_reason(name, call)
        if reason is None:
            log.debug("%s runs on %s%s", call, name, "".join(f"; {d}" for d in declined))
            return BACKENDS[name]
        declined.append(f"{name} declined: {reason}")
    raise RuntimeError(f"{call.operator}: no backend runs this call: " + "; ".join(declined))


for _module in pkgutil.iter_modules(__path__):
    if _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")
