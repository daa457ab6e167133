"""MONAI's Swin UNETR modules with the ``forward`` of `swin_kernels.modules` and `swin_kernels.convolution_blocks`.

Each class here inherits from ours first and from MONAI's second and adds nothing, so an instance of
MONAI's class becomes fused by assigning ``__class__``: its parameters, buffers, hooks and every
reference to them stay, ``isinstance`` with MONAI's type holds, and copying and pickling find the class
by name.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator

import torch
import torch.nn as nn
from monai.networks.blocks import UnetOutBlock, UnetResBlock, UnetrUpBlock
from monai.networks.nets import swin_unetr

from .. import convolution_blocks, modules
from ..geometry import WindowGrid
from ..plain import change, class_of

log = logging.getLogger("swin_kernels")


class FusedWindowAttention(modules.WindowAttention, swin_unetr.WindowAttention):
    """`swin_kernels.modules.WindowAttention` in place of MONAI's: takes a volume, and windows as MONAI's does."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """A volume ``(B, *S, C)`` and the shift, fused; or windows ``(B·nW, n, C)`` and the mask, by MONAI's code."""
        kind = swin_unetr.WindowAttention if x.dim() == 3 else modules.WindowAttention
        return kind.forward(self, x, *args, **kwargs)


class FusedSwinTransformerBlock(modules.SwinTransformerBlock, swin_unetr.SwinTransformerBlock):
    """`swin_kernels.modules.SwinTransformerBlock` in place of MONAI's."""

    mlp_class = swin_unetr.Mlp

    def forward_part1(self, x: torch.Tensor, mask_matrix: torch.Tensor | None = None) -> torch.Tensor:
        """The attention branch, without residual; by MONAI's code while `changed_attention` finds something."""
        if (reason := changed_attention(self)) is None:
            return super().forward_part1(x)
        if not torch.compiler.is_dynamo_compiling():  # which would break its graph at a line for the log
            log.debug("a SwinTransformerBlock runs its attention on MONAI's code: %s", reason)
        grid = WindowGrid.of(x.shape[1:-1], self.window_size, self.shift_size)
        if grid.is_shifted:
            mask_matrix = swin_unetr.compute_mask(grid.padded, grid.window, grid.shift, x.device)
        return swin_unetr.SwinTransformerBlock.forward_part1(self, x, mask_matrix)


def changed_attention(block: nn.Module) -> str | None:
    """Why the attention of `block` has to run part by part, None if fused: what the fused one does not call changed."""
    attention = block.attn
    parts = {
        "attn": (attention, (swin_unetr.WindowAttention, FusedWindowAttention)),
        "attn.softmax": (attention.softmax, (nn.Softmax,)),
        "attn.attn_drop": (attention.attn_drop, (nn.Dropout,)),
    }
    for name, (part, kinds) in parts.items():
        if class_of(part) not in kinds:
            return f"{name} is a {type(part).__qualname__}"
        if reason := change(part):
            return f"{name} {reason}"
    if tuple(attention.window_size) != tuple(block.window_size):
        return f"attn.window_size is {tuple(attention.window_size)}, that of the block {tuple(block.window_size)}"
    return None


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
                if reason := changed_attention(module):
                    left[f"the attention of {name or 'model'}"] = reason
    for name, module in _convolution_blocks(model).items():
        if reason := _replaced_methods(module):
            left[name] = reason
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


def _replaced_methods(module: nn.Module) -> str | None:
    """Which methods of its class were replaced on the instance `module`; None if none."""
    names = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    return f"the {', '.join(names)} of this {type(module).__name__} was replaced" if names else None


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
    if reason := _replaced_methods(module):
        return reason
    if original is swin_unetr.SwinTransformerBlock:
        if isinstance(module.attn, swin_unetr.WindowAttention) and not modules.holds_bias_index(
            module.attn.relative_position_index, module.attn.window_size
        ):
            return "its attn.relative_position_index is not that of attn.window_size"
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
