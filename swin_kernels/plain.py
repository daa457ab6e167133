"""Whether a layer does what its class says and no more, so that an operator may compute it in its place.

What changes a layer without changing its class is common: hooks (activation maps, spectral norm, offloading), a
``forward`` set on the instance (adapters) or patched into the class, parametrisations, quantised or sharded parameters.
Code that computes what a layer would, without calling it, asks here first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard, TypeVar

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as global_hooks
from torch.utils._device import DeviceContext

Layer = TypeVar("Layer", bound=nn.Module)

TRACED = (FakeTensor, FunctionalTensor)
"""What stands for plain tensors while PyTorch traces."""

_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, *TRACED)
"""Other subclasses may compute differently."""

_REPLACEABLE = ("forward", "forward_part1", "forward_part2", "_call_impl", "_conv_forward", "_apply_instance_norm")
"""Methods by which PyTorch's layers and MONAI's blocks compute; set on an instance they replace the class's."""

_OWN: dict[type[nn.Module], dict[str, Callable | None]] = {}
"""For each class the methods by which it computes, as its own module defines them: see `know`."""


def know(kind: type[nn.Module], *methods: str) -> None:
    """Let `patched` tell from now on whether `methods` of `kind`, or those by which modules are called, were replaced.

    None is remembered for a method that was already replaced.
    """
    _OWN[kind] = {name: _own(kind, name) for name in (*methods, "__call__", "_call_impl")}


def _own(kind: type, name: str) -> Callable | None:
    """The method `name` of `kind` if the module of the class that has it defined it; None if it was replaced."""
    owner = next(base for base in kind.__mro__ if name in vars(base))
    method = vars(owner)[name]
    return method if getattr(method, "__globals__", {}).get("__name__") == owner.__module__ else None


def patched(kind: type[nn.Module]) -> str | None:
    """Which of the methods that `know` was given is no longer the class's own, or None."""
    for name, own in _OWN.get(kind, {}).items():
        if getattr(kind, name) is own or (own is None and _put_back(kind, name)):
            continue
        if name != "__call__" or not torch.compiler.is_exporting():  # which calls modules in its own way
            return f"{kind.__name__}.{name} was replaced"
    return None


def _put_back(kind: type[nn.Module], name: str) -> bool:
    """Whether a method `name`, replaced when `know` looked, is now the class's own; if so, remember it."""
    _OWN[kind][name] = _own(kind, name)
    return _OWN[kind][name] is not None


_kind: type[nn.Module]
for _kind in (nn.Dropout, nn.Identity, nn.LayerNorm, nn.LeakyReLU, nn.Linear, nn.Sequential, nn.Softmax):
    know(_kind, "forward")
for _kind in (nn.Conv2d, nn.Conv3d):
    know(_kind, "forward", "_conv_forward")
for _kind in (nn.InstanceNorm2d, nn.InstanceNorm3d):
    know(_kind, "forward", "_apply_instance_norm")


def is_plain(module: nn.Module | None, *kinds: type[Layer]) -> TypeGuard[Layer]:
    """Whether the class of `module` is one of `kinds`, not a subclass, and `is_untouched`.

    Never while `torch.export` traces: layers are proxies then, which must be called to be seen.
    """
    return module is not None and type(module) in kinds and is_untouched(module)


def is_unchanged(module: nn.Module, *kinds: type[Layer]) -> TypeGuard[Layer]:
    """As `is_plain`, also while `torch.export` traces: for layers that are called in any case."""
    return class_of(module) in kinds and is_untouched(module)


def class_of(module: nn.Module) -> type:
    """The class of `module`, also while `torch.export` traces and has put a proxy in its place."""
    if torch.compiler.is_exporting() and (base := getattr(module, "get_base", None)) is not None:
        module = base()
    return type(module)


def is_untouched(module: nn.Module) -> bool:
    """Whether calling `module` does what its class says; its parts are not looked at."""
    return change(module) is None


def in_function_mode() -> bool:
    """Whether a `torch.overrides.TorchFunctionMode` may look at, or change, what layers compute.

    Not the one by which ``with torch.device(...)`` places new tensors, nor those of tracers.
    """
    modes = torch._C._len_torch_function_stack()
    if not modes or torch.compiler.is_compiling():
        return False
    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(modes))


def change(module: nn.Module) -> str | None:
    """What keeps a call of `module` from doing what its class says and no more, or None.

    A method replaced on the instance or the class, hooks, of `module` or those that PyTorch calls for every module, or
    parameters that are not plain tensors.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has backward hooks"
    if torch._C._len_torch_function_stack() and in_function_mode():  # asked for every layer: the cheap test first
        return "is called in a TorchFunctionMode"
    if global_hooks._has_any_global_hook():
        return "is subject to hooks for every module"
    attributes = module.__dict__
    for method in _REPLACEABLE:
        if method in attributes:
            return f"has its {method} replaced"
    if reason := patched(type(module)):
        return f"is of a changed class: {reason}"
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) not in _PLAIN_TENSORS:
            return f"has a {type(parameter).__name__} as {name}"
    return None
