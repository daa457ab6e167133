"""The network that a command trains or loads, as options that travel with its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .model import SwinUNETR


@dataclass(frozen=True)
class Architecture:
    """Swin UNETR's size and kind; fields are `SwinUNETR`'s arguments of the same name.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output.
        feature_size: channels of the first stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: tokens of a window on each axis.
        spatial_dims: 2 or 3.
        use_v2: a residual convolution block before each stage (SwinUNETR-V2).
        downsample: order of the patch merging; merging_legacy is what weights trained with MONAI < 1.5 need.
        use_checkpoint: compute activations again in the backward, for less memory.
        drop_rate: dropout of tokens.
        attn_drop_rate: dropout of attention weights.
        dropout_path_rate: stochastic depth.
    """

    in_channels: int = 1
    out_channels: int = 2
    feature_size: int = 48
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    num_heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    window_size: int = 7
    spatial_dims: Literal[2, 3] = 3
    use_v2: bool = False
    downsample: Literal["merging", "mergingv2", "merging_legacy"] = "merging"
    use_checkpoint: bool = False
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    dropout_path_rate: float = 0.0

    def build(self) -> SwinUNETR:
        """A network with fresh weights, drawn from PyTorch's generator.

        Its weights are in channels-last order, in which convolutions of few channels run faster.
        """
        network = SwinUNETR(**self.__dict__)
        order = {2: torch.channels_last, 3: torch.channels_last_3d}[self.spatial_dims]
        return network.to(memory_format=order)
