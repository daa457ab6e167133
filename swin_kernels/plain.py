"""Whether a layer does what its class says and no more, so that an operator may compute it in its place.

What changes a layer without changing its class is common: hooks (activation maps, spectral norm, offloading), a
``forward`` set on the instance (adapters), parametrisations, quantised or sharded parameters. Whoever does not call a
layer asks here first.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as global_hooks

_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
"""The last two stand for plain tensors while PyTorch traces. Other subclasses bring arithmetic of their own."""

_REPLACEABLE = ("forward", "_call_impl", "_conv_forward", "_apply_instance_norm")
"""Methods by which PyTorch's layers compute; set on an instance they replace the class's."""


def is_plain(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether `module` is exactly of one of `kinds`, no subclass, and `is_untouched`.

    While `torch.export` traces no layer is: it sees proxies, and calls the layers.
    """
    return type(module) in kinds and is_untouched(module)


def is_unchanged(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """`is_plain`, while `torch.export` traces, too: for layers that are called in any case."""
    return class_of(module) in kinds and is_untouched(module)


def class_of(module: nn.Module) -> type:
    """The class of `module`. `torch.export` hands out proxies while it traces, of a class made for each."""
    if torch.compiler.is_exporting() and hasattr(module, "get_base"):
        module = module.get_base()
    return type(module)


def is_untouched(module: nn.Module) -> bool:
    """Whether calling `module` does what its class says; its parts are not looked at."""
    return change(module) is None


def change(module: nn.Module) -> str | None:
    """What keeps a call of `module` from doing what its class says and no more, or None.

    A method replaced on the instance, hooks, of `module` or those that PyTorch calls for every module, or parameters
    that are no plain tensors.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has backward hooks"
    if global_hooks._has_any_global_hook():
        return "is subject to hooks for every module"
    for method in _REPLACEABLE:
        if method in module.__dict__:
            return f"has its {method} replaced"
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) not in _PLAIN_TENSORS:
            return f"has a {type(parameter).__name__} as {name}"
    return None
