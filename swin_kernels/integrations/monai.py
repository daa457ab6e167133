"""MONAI's Swin UNETR modules with the ``forward`` of `swin_kernels.modules` and `swin_kernels.convolution_blocks`.

Each class here inherits from ours first and from MONAI's second and only adds the choice between the two, so an
instance of MONAI's class becomes fused by assigning ``__class__``: its parameters, buffers, hooks and every reference
to them stay, ``isinstance`` with MONAI's type holds, and copying and pickling find the class by name.

MONAI's code runs where something was changed that ours does not call. This is checked in every call, because it may
happen at any time.
"""

from __future__ import annotations

import logging
import numbers
from collections.abc import Container, Iterator
from types import EllipsisType
from typing import Any, ClassVar, Protocol

import torch
import torch.nn as nn
from monai.networks.blocks import PatchEmbed, UnetOutBlock, UnetResBlock, UnetrUpBlock
from monai.networks.nets import swin_unetr
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import convolution_blocks, modules
from ..geometry import WindowGrid, bias_table_length
from ..ops._operator import is_transformed
from ..plain import TRACED, change, class_of, in_function_mode, is_unchanged, know, patched

log = logging.getLogger("swin_kernels")


_COMPUTING: dict[type[nn.Module], tuple[str, ...]] = {
    swin_unetr.WindowAttention: ("forward",),
    swin_unetr.SwinTransformerBlock: ("forward", "forward_part1", "forward_part2"),
    swin_unetr.BasicLayer: ("forward",),
    swin_unetr.SwinTransformer: ("forward", "proj_out"),
    swin_unetr.Mlp: ("forward",),
    UnetResBlock: ("forward",),
    UnetrUpBlock: ("forward",),
    UnetOutBlock: ("forward",),
}
"""Methods of MONAI's classes that ours replace; those that someone else replaced are called."""

for _kind, _methods in _COMPUTING.items():
    know(_kind, *_methods)


class _Fused(Protocol):
    """A module in place of one of MONAI's class `original`."""

    original: ClassVar[type[nn.Module]]


def _code_of(module: _Fused, own: type[nn.Module]) -> Any:
    """The class whose code a fused `module` runs: `own`, or MONAI's if that or what it calls was changed."""
    return module.original if patched(module.original) or in_function_mode() else own


class FusedWindowAttention(modules.WindowAttention, swin_unetr.WindowAttention):
    """`swin_kernels.modules.WindowAttention` in place of MONAI's: takes a volume, and windows as MONAI's does."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """A volume ``(B, *S, C)`` and the shift, fused; or windows ``(B·nW, n, C)`` and the mask, by MONAI's code."""
        kind: Any = swin_unetr.WindowAttention if x.dim() == 3 else modules.WindowAttention
        return kind.forward(self, x, *args, **kwargs)


class FusedSwinTransformerBlock(modules.SwinTransformerBlock, swin_unetr.SwinTransformerBlock):
    """`swin_kernels.modules.SwinTransformerBlock` in place of MONAI's."""

    original: ClassVar[type[nn.Module]] = swin_unetr.SwinTransformerBlock
    mlp_class: ClassVar[type[Any]] = swin_unetr.Mlp
    attn: FusedWindowAttention
    drop_path: swin_unetr.DropPath | nn.Identity
    mlp: swin_unetr.Mlp

    def forward(self, x: torch.Tensor, mask_matrix: torch.Tensor | EllipsisType | None = ...) -> torch.Tensor:
        """``(B, *S, C)`` to ``(B, *S, C)``; by MONAI's code if that was changed."""
        kind = _code_of(self, modules.SwinTransformerBlock)
        return kind.forward(self, x, mask_matrix)

    def forward_part1(self, x: torch.Tensor, mask_matrix: torch.Tensor | EllipsisType | None = ...) -> torch.Tensor:
        """The attention branch, without residual; by MONAI's code while `changed_attention` finds something.

        Without `mask_matrix` tokens are masked as in a stage. With any other mask than that of the stage, or with None
        for no mask, MONAI's code runs.
        """
        reason = patched(swin_unetr.SwinTransformerBlock) or changed_attention(self)
        if reason is None and mask_matrix is ...:
            return super().forward_part1(x)
        grid = WindowGrid.of(modules.extents(x), self.window_size, self.shift_size)
        if reason is None and mask_matrix is not ... and (not grid.is_shifted or _is_mask_of(mask_matrix, grid)):
            return super().forward_part1(x)
        reason = reason or "it was given another mask than that of its stage"
        if not torch.compiler.is_dynamo_compiling():  # a line in the log would break the graph
            log.debug("a SwinTransformerBlock runs its attention on MONAI's code: %s", reason)
        if mask_matrix is ... and grid.is_shifted:
            mask_matrix = swin_unetr.compute_mask(grid.padded, grid.window, grid.shift, x.device)
        return swin_unetr.SwinTransformerBlock.forward_part1(self, x, mask_matrix)

    def forward_part2(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP branch, without residual; by MONAI's code if that was changed."""
        kind = _code_of(self, modules.SwinTransformerBlock)
        return kind.forward_part2(self, x)


def changed_attention(block: swin_unetr.SwinTransformerBlock) -> str | None:
    """Why the attention of `block` cannot be fused, or None: a part that the fused one does not call was changed."""
    attention = block.attn
    parts: dict[str, tuple[nn.Module, tuple[type[nn.Module], ...]]] = {
        "attn": (attention, (swin_unetr.WindowAttention, FusedWindowAttention)),
        "attn.softmax": (attention.softmax, (nn.Softmax,)),
        "attn.attn_drop": (attention.attn_drop, (nn.Dropout,)),
    }
    for name, (part, kinds) in parts.items():
        if class_of(part) not in kinds:
            return f"{name} is a {type(part).__qualname__}"
        if reason := change(part):
            return f"{name} {reason}"
    return patched(swin_unetr.WindowAttention) or _changed_setting(block)


def _changed_setting(block: swin_unetr.SwinTransformerBlock) -> str | None:
    """Which number or tensor in the attention of `block` only MONAI's code can use, or None."""
    attention = block.attn
    window, heads = tuple(attention.window_size), attention.num_heads
    if window != tuple(block.window_size):
        return f"attn.window_size is {window}, that of the block {tuple(block.window_size)}"
    if attention.softmax.dim not in (-1, 3):  # of (B·nW, heads, n, n)
        return f"attn.softmax is over axis {attention.softmax.dim}"
    if not isinstance(attention.scale, numbers.Real):
        return f"attn.scale is a {type(attention.scale).__name__}"
    if (shape := attention.relative_position_bias_table.shape) != (bias_table_length(window), heads):
        return f"attn.relative_position_bias_table has shape {tuple(shape)}, for {heads} heads and windows of {window}"
    index: Any = attention.relative_position_index  # a buffer, whose type MONAI does not declare
    if not _holds_bias_index(index, window):
        return "attn.relative_position_index is not that of attn.window_size"
    return None


_SEEN_INDEX = WeakIdKeyDictionary()
"""``relative_position_index`` to its version, and the window whose index it was when last compared."""


def _holds_bias_index(index: torch.Tensor, window: tuple[int, ...]) -> bool:
    """`modules.holds_bias_index`, asked again only if the tensor is another one or was written to.

    True without asking while a graph is recorded, or where a tensor has no values.
    """
    if torch.compiler.is_compiling() or isinstance(index, TRACED) or is_functorch_wrapped_tensor(index):
        return True
    if index.is_cuda and torch.cuda.is_current_stream_capturing():  # a capture cannot wait for a comparison
        return True
    seen = _version(index), window
    if _SEEN_INDEX.get(index) != seen:
        if not modules.holds_bias_index(index, window):
            return False
        _SEEN_INDEX[index] = seen
    return True


def _version(tensor: torch.Tensor) -> int | None:
    """How often `tensor` was written to; None for tensors of inference mode, which do not count."""
    return None if tensor.is_inference() else tensor._version


_MASKS = WeakIdKeyDictionary()
"""Masks to their windows, and to the version for which this is known."""


def _is_mask_of(mask: torch.Tensor | None, grid: WindowGrid) -> bool:
    """Whether `mask` is known to be, or has the values of, the one that MONAI computes for `grid`.

    Where a comparison would break a graph, or wait for a stream that is being captured, only what is known counts.
    """
    if mask is None or torch.compiler.is_compiling():
        return False
    seen = grid, _version(mask)
    if _MASKS.get(mask) == seen:
        return True
    if isinstance(mask, TRACED) or is_transformed() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    if not torch.equal(mask, swin_unetr.compute_mask(grid.padded, grid.window, grid.shift, mask.device)):
        return False
    _MASKS[mask] = seen
    return True


class FusedBasicLayer(modules.BasicLayer, swin_unetr.BasicLayer):
    """`swin_kernels.modules.BasicLayer` in place of MONAI's: computes a mask only for blocks that were changed."""

    original: ClassVar[type[nn.Module]] = swin_unetr.BasicLayer
    downsample: nn.Module | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, *S)`` to ``(B, 2C, *⌈S/2⌉)``, or to ``(B, C, *S)`` without `downsample`."""
        kind = _code_of(self, modules.BasicLayer)
        return kind.forward(self, x)

    def run_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, *S, C)`` through all blocks, to the same shape."""
        if not any(_may_use_mask(block, self) for block in self.blocks):
            return super().run_blocks(x)
        shape = x.shape
        grid = WindowGrid.of(modules.extents(x), self.window_size, self.shift_size)
        mask = swin_unetr.compute_mask(grid.padded, grid.window, grid.shift, x.device)
        if not torch.compiler.is_compiling():
            _MASKS[mask] = grid, _version(mask)
        for block in self.blocks:
            x = block(x, mask)
        return x.view(*shape[:-1], -1)


def _may_use_mask(block: nn.Module, stage: FusedBasicLayer) -> bool:
    """Whether `block` needs the mask of `stage`: every block does, but ours if unchanged and with the same windows."""
    if not is_unchanged(block, FusedSwinTransformerBlock, modules.SwinTransformerBlock):
        return True
    return _other_windows(block, stage) is not None


def _other_windows(block: Any, stage: swin_unetr.BasicLayer) -> str | None:
    """How the windows of `block` differ from those of the mask of `stage`; None if they do not, or are not shifted."""
    for name in ("shift_size", "window_size") if any(block.shift_size) else ():
        own, mask = tuple(getattr(block, name)), tuple(getattr(stage, name))
        if own != mask:
            return f"{name} is {own}, that of the stage {mask}"
    return None


class FusedSwinTransformer(modules.SwinTransformer, swin_unetr.SwinTransformer):
    """`swin_kernels.modules.SwinTransformer` in place of MONAI's: leaves the tokens channels last."""

    original: ClassVar[type[nn.Module]] = swin_unetr.SwinTransformer
    patch_embed: PatchEmbed

    def forward(self, x: torch.Tensor, normalize: bool = True) -> list[torch.Tensor]:
        """Five feature maps, finest first: ``(B, 2^i · C, *⌈S/2^i⌉)`` with `i` from 0 to 4."""
        kind = _code_of(self, modules.SwinTransformer)
        return kind.forward(self, x, normalize)

    def proj_out(self, x: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Features as handed to the decoder; by MONAI's code if that was changed."""
        kind = _code_of(self, modules.SwinTransformer)
        return kind.proj_out(self, x, normalize)


class FusedResidualBlock(convolution_blocks.ResidualBlock, UnetResBlock):
    """`swin_kernels.convolution_blocks.ResidualBlock` in place of MONAI's `UnetResBlock`."""

    original: ClassVar[type[nn.Module]] = UnetResBlock

    def runs_fused(self, x: torch.Tensor) -> bool:
        """Whether MONAI's class is unchanged, and the norms are what a kernel computes for `x`."""
        return patched(self.original) is None and super().runs_fused(x)


class FusedUpBlock(convolution_blocks.UpBlock, UnetrUpBlock):
    """`swin_kernels.convolution_blocks.UpBlock` in place of MONAI's `UnetrUpBlock`."""

    original: ClassVar[type[nn.Module]] = UnetrUpBlock

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """``(B, C_in, *S)`` and ``(B, C_out, *2S)`` to ``(B, C_out, *2S)``."""
        kind = _code_of(self, convolution_blocks.UpBlock)
        return kind.forward(self, x, skip)


class FusedOutBlock(convolution_blocks.OutBlock, UnetOutBlock):
    """`swin_kernels.convolution_blocks.OutBlock` in place of MONAI's."""


# From the inside out: whether a layer can be taken over depends on its blocks.
_TAKEN_OVER: dict[type[nn.Module], type[nn.Module]] = {
    swin_unetr.SwinTransformerBlock: FusedSwinTransformerBlock,
    swin_unetr.BasicLayer: FusedBasicLayer,
    swin_unetr.SwinTransformer: FusedSwinTransformer,
}

# In other networks these blocks stay MONAI's.
_CONVOLUTION_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    UnetResBlock: FusedResidualBlock,
    UnetrUpBlock: FusedUpBlock,
    UnetOutBlock: FusedOutBlock,
}
_HAVE_CONVOLUTION_BLOCKS = (swin_unetr.SwinUNETR, swin_unetr.SwinTransformer)


def swin_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules inside `model` that are Swin blocks, stages or transformers, MONAI's or ours."""
    accepted: tuple[type[nn.Module], ...]
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
            if isinstance(module, swin_unetr.SwinTransformerBlock):
                swaps[module.attn] = FusedWindowAttention
                if reason := changed_attention(module):
                    left[f"the attention of {name or 'model'}"] = reason
            if isinstance(module, swin_unetr.BasicLayer):
                for i, block in enumerate(module.blocks):
                    if reason := _other_windows(block, module):
                        left[f"the attention of {f'{name}.blocks.{i}'.strip('.')}"] = reason
    for name, module in _convolution_blocks(model).items():
        if reason := patched(type(module)) or _replaced_methods(module):
            left[name] = reason
        else:
            swaps[module] = _CONVOLUTION_BLOCKS[type(module)]
    return swaps, left


def _convolution_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """MONAI's convolution blocks, by name, in every Swin UNETR inside `model`; not their subclasses."""
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
    if reason := patched(original) or _replaced_methods(module):
        return reason
    foreign: list[nn.Module]
    if isinstance(module, swin_unetr.SwinTransformerBlock):
        if isinstance(module.attn, swin_unetr.WindowAttention):
            index: Any = module.attn.relative_position_index
            if not modules.holds_bias_index(index, module.attn.window_size):
                return "its attn.relative_position_index is not that of attn.window_size"
        foreign = [module.attn] if type(module.attn) is not swin_unetr.WindowAttention else []
    elif isinstance(module, swin_unetr.BasicLayer):  # blocks of MONAI's need the mask
        foreign = [b for b in module.blocks if b not in swaps and not isinstance(b, modules.SwinTransformerBlock)]
    else:  # another stage may need its input contiguous, channels first
        stages = [stage for i in range(1, 5) for stage in getattr(module, f"layers{i}")]
        foreign = [s for s in stages if type(s) not in (swin_unetr.BasicLayer, FusedBasicLayer)]
    if foreign:
        names = ", ".join(sorted({type(m).__qualname__ for m in foreign}))
        return f"this {original.__name__} is made of parts that are not fused: {names}"
    return None
