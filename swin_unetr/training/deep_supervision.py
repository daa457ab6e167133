"""Losses on the decoder's coarser maps, which send gradient to its lower part directly.

Source: Lee et al., "Deeply-Supervised Nets", https://arxiv.org/abs/1409.5185; for segmentation as in nnU-Net,
https://doi.org/10.1038/s41592-020-01008-z.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
import torch.nn as nn
from torch.utils.hooks import RemovableHandle

from ..model import OutBlock, SwinUNETR
from .options import DECODERS


class DeeplySupervised(nn.Module):
    """A `SwinUNETR` and a 1×1×1 convolution to the classes on each of some coarser maps of its decoder.

    The network itself, including its state dict, is unchanged: forward hooks capture the outputs of its decoder blocks,
    and the convolutions belong to this module.
    """

    def __init__(self, network: SwinUNETR, levels: int) -> None:
        """
        Args:
            levels: how many maps beside the full resolution, finest first.

        Raises:
            ValueError: the decoder has fewer.
        """
        super().__init__()
        if not 1 <= levels <= len(DECODERS):
            raise ValueError(f"deep_supervision is {levels}; accepted are 1 to {len(DECODERS)} coarser maps")
        self.network = network
        convolution = network.out.conv.conv
        dims = convolution.weight.dim() - 2
        # decoder2's map has as many channels as the first stage, and each coarser one twice as many.
        self.heads = nn.ModuleDict(
            {
                name: OutBlock(dims, 2**level * convolution.in_channels, convolution.out_channels)
                for level, name in enumerate(DECODERS[:levels])
            }
        )

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Logits for ``image (B, C, *S)``, finest first: ``(B, classes, *S)``, ``(B, classes, *S / 2)``, …"""
        maps: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            for name in self.heads:
                block = getattr(self.network, name)
                stack.enter_context(_listening(block, maps, name))
            logits = self.network(image)
        return [logits, *(head(maps[name]) for name, head in self.heads.items())]


def _listening(block: nn.Module, maps: dict[str, torch.Tensor], name: str) -> RemovableHandle:
    """Within this context, the output of `block` is put into `maps`."""

    def keep(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        maps[name] = output

    return block.register_forward_hook(keep)
