"""MONAI's Swin UNETR modules with the ``forward`` of `swin_kernels.modules` and `swin_kernels.convolution_blocks`.

Each class here inherits from ours first and from MONAI's second and adds nothing, so an instance of
MONAI's class becomes fused by assigning ``__class__``: its parameters, buffers, hooks and every
reference to them stay, ``isinstance`` with MONAI's type holds, and copying and pickling find the class
by name.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch.nn as nn
from monai.networks.blocks import UnetOutBlock, UnetResBlock, UnetrUpBlock
from monai.networks.nets import swin_unetr

from .. import convolution_blocks, modules


class FusedWindowAttention(modules.WindowAttention, swin_unetr.WindowAttention):
    """`swin_kernels.modules.WindowAttention` in place of MONAI's: takes the volume, not its windows."""


class FusedSwinTransformerBlock(modules.SwinTransformerBlock, swin_unetr.SwinTransformerBlock):
    """`swin_kernels.modules.SwinTransformerBlock` in place of MONAI's."""


class FusedBasicLayer(modules.BasicLayer, swin_unetr.BasicLayer):
    """`swin_kernels.modules.BasicLayer` in place of MONAI's: computes no mask."""


class FusedSwinTransformer(modules.SwinTransformer, swin_unetr.SwinTransformer):
    """`swin_kernels.modules.SwinTransformer` in place of MONAI's: leaves the tokens channels last."""


class FusedResidualBlock(convolution_blocks.ResidualBlock, UnetResBlock):
    """`swin_kernels.convolution_blocks.ResidualBlock` in place of MONAI's `UnetResBlock`."""


class FusedUpBlock(convolution_blocks.UpBlock, UnetrUpBlock):
    """`swin_kernels.convolution_blocks.UpBlock` in place of MONAI's `UnetrUpBlock`."""


class FusedOutBlock(convolution_blocks.OutBlock, UnetOutBlock):
    """`swin_kernels.convolution_blocks.OutBlock` in place of MONAI's."""


# From the inside out: whether a layer can go depends on its blocks.
_TAKEN_OVER = {
    swin_unetr.SwinTransformerBlock: FusedSwinTransformerBlock,
    swin_unetr.BasicLayer: FusedBasicLayer,
    swin_unetr.SwinTransformer: FusedSwinTransformer,
}

# Other networks have these blocks too and keep them.
_CONVOLUTION_BLOCKS = {UnetResBlock: FusedResidualBlock, UnetrUpBlock: FusedUpBlock, UnetOutBlock: FusedOutBlock}
_HAVE_CONVOLUTION_BLOCKS = (swin_unetr.SwinUNETR, swin_unetr.SwinTransformer)


def swin_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules inside `model` that are Swin blocks, stages or transformers, MONAI's or ours."""
    accepted = (*_TAKEN_OVER, modules.SwinTransformerBlock, modules.BasicLayer, modules.SwinTransformer)
    return ((name, module) for name, module in model.named_modules() if isinstance(module, accepted))


def plan(model: nn.Module) -> tuple[dict[nn.Module, type[nn.Module]], dict[str, str]]:
    """What can be taken over inside `model`, module to fused class, and what cannot, name to reason."""
    swaps: dict[nn.Module, type[nn.Module]] = {}
    left: dict[str, str] = {}
    for original, fused in _TAKEN_OVER.items():
        for name, module in model.named_modules():
            if not isinstance(module, original) or isinstance(module, fused):
                continue
            if reason := _reason_to_leave(module, original, swaps):
                left[name] = reason
                continue
            swaps[module] = fused
            if original is swin_unetr.SwinTransformerBlock:
                swaps[module.attn] = FusedWindowAttention
    for name, module in _convolution_blocks(model).items():
        if "forward" in vars(module):
            left[name] = f"the forward of this {type(module).__name__} was replaced"
        else:
            swaps[module] = _CONVOLUTION_BLOCKS[type(module)]
    return swaps, left


def _convolution_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name to convolution block of MONAI's that is part of a Swin UNETR inside `model`; subclasses are others."""
    return {
        f"{root}.{name}".strip("."): module
        for root, network in model.named_modules()
        if isinstance(network, _HAVE_CONVOLUTION_BLOCKS)
        for name, module in network.named_modules()
        if type(module) in _CONVOLUTION_BLOCKS
    }


def give_back(model: nn.Module) -> None:
    """Give fused modules inside `model` MONAI's classes."""
    originals = {fused: original for original, fused in (_TAKEN_OVER | _CONVOLUTION_BLOCKS).items()}
    originals[FusedWindowAttention] = swin_unetr.WindowAttention
    for module in model.modules():
        if type(module) in originals:
            module.__class__ = originals[type(module)]


def _reason_to_leave(module: nn.Module, original: type[nn.Module], swaps: Container[nn.Module]) -> str | None:
    """Why `module`, an instance of MONAI's `original`, keeps its class; None if it can be swapped."""
    if type(module) is not original:
        return f"{type(module).__qualname__} is a subclass of MONAI's {original.__name__}"
    if "forward" in vars(module):
        return f"the forward of this {original.__name__} was replaced"
    if original is swin_unetr.SwinTransformerBlock:
        foreign = [module.attn] if type(module.attn) is not swin_unetr.WindowAttention else []
    elif original is swin_unetr.BasicLayer:  # a block of MONAI's needs the mask
        foreign = [b for b in module.blocks if b not in swaps and not isinstance(b, modules.SwinTransformerBlock)]
    else:  # another stage may need its input contiguous, channels first
        stages = [stage for i in range(1, 5) for stage in getattr(module, f"layers{i}")]
        foreign = [s for s in stages if type(s) not in (swin_unetr.BasicLayer, FusedBasicLayer)]
    if foreign:
        names = ", ".join(sorted({type(m).__qualname__ for m in foreign}))
        return f"this {original.__name__} is made of parts that are not fused: {names}"
    return None
