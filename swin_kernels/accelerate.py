"""`accelerate` and `restore`: give MONAI's Swin UNETR the fused classes, in place, and take them back."""

from __future__ import annotations

import logging
import warnings

import torch.nn as nn

log = logging.getLogger("swin_kernels")


def accelerate(model: nn.Module, *, strict: bool = False) -> nn.Module:
    """Replace every Swin Transformer of MONAI 1.5 or 1.6 inside `model` by the fused one, in place.

    Only the classes of modules change: parameters, buffers, hooks, references held by an optimizer and
    the state dict stay as they are, and ``isinstance`` with MONAI's types still holds. A module that was
    taken over is an instance of its namesake in `swin_kernels.modules`, and its type's name in
    ``print(model)`` starts with "Fused". Calling `accelerate` again changes nothing.

    What cannot be taken over (subclasses, replaced ``forward`` methods, other attention, Hyena stages)
    keeps running on MONAI's code and is named in a warning. Call `accelerate` before
    `torch.compile`; `torch.jit.script` does not support the fused modules. Dropout draws different
    random numbers than MONAI's; ``use_flash_attention`` no longer has an effect.

    Args:
        model: a `monai.networks.nets.SwinUNETR`, a SwinTransformer, or any module that contains one.
        strict: raise instead of warning if something cannot be taken over.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` contains no Swin Transformer of MONAI or, under `strict`, something that cannot
            be taken over; `model` is then unchanged.
    """
    integration = _integration(model, "accelerate")
    if not any(integration.swin_modules(model)):
        raise ValueError(
            f"accelerate: model is a {type(model).__qualname__} without a Swin Transformer; accepted are modules that "
            "contain monai.networks.nets.swin_unetr's SwinTransformer, BasicLayer or SwinTransformerBlock"
        )
    swaps, left = integration.plan(model)
    if left:
        message = "accelerate: left on MONAI's code: " + "; ".join(f"{n or 'model'}: {r}" for n, r in left.items())
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    for module, fused in swaps.items():
        module.__class__ = fused
    log.info("accelerate: %s: %d modules fused, %d left", type(model).__qualname__, len(swaps), len(left))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Give the modules that `accelerate` took over inside `model` their own classes back, in place.

    Returns:
        `model`; unchanged if nothing in it was accelerated.

    Raises:
        TypeError: `model` is not a module.
    """
    _integration(model, "restore").give_back(model)
    return model


def _integration(model: object, where: str):
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model is a {type(model).__name__}; accepted is a torch.nn.Module")
    from .integrations import monai  # MONAI is imported only when it is needed

    return monai
