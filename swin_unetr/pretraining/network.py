"""The encoder with a head for each task of pretraining.

Source: Tang et al., "Self-Supervised Pre-Training of Swin Transformers for 3D Medical Image Analysis",
https://arxiv.org/abs/2111.14791, and the code published with it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn as nn
from monai.networks.layers.factories import Norm

from swin_kernels.cpu_bfloat16 import in_float32

from ..model import SwinTransformer
from .options import check_extents
from .views import QUARTER_TURNS

DEEPEST = 16  # channels of the deepest map over the encoder's first


class Answers(NamedTuple):
    """What the heads say of images ``(B, C, *S)``.

    Attributes:
        turns: logits of the rotation ``(B, 4)``.
        embedding: for contrast ``(B, E)``.
        image: the reconstruction ``(B, C, *S)``.
    """

    turns: torch.Tensor
    embedding: torch.Tensor
    image: torch.Tensor


class PretrainingNetwork(nn.Module):
    """An encoder and its heads, all on the deepest feature map ``(B, D, *S / 32)``.

    As published, rotation reads the map's first token and contrast its second; reconstruction upsamples the map by
    convolutions. The encoder is called ``swinViT`` as in `SwinUNETR`, so a state dict of this network loads into one.
    """

    def __init__(self, encoder: SwinTransformer, in_channels: int, spatial_dims: int = 3, embedding: int = 512) -> None:
        """
        Args:
            encoder: the ``swinViT`` of a `swin_unetr.SwinUNETR`.
            in_channels: channels of the image.
            spatial_dims: 2 or 3.
            embedding: length ``E`` of the vectors that contrast compares.
        """
        super().__init__()
        depth = DEEPEST * encoder.embed_dim
        self.swinViT = encoder
        self.rotation_head = nn.Linear(depth, QUARTER_TURNS)
        self.contrastive_head = nn.Linear(depth, embedding)
        self.reconstruction_head = _upsampling(depth, in_channels, spatial_dims)

    def forward(self, image: torch.Tensor) -> Answers:
        """Answers for ``image (B, C, *S)``, whose extents divide by 32.

        Raises:
            ValueError: an extent does not divide by 32, or `image` is too small (`check_extents`).
        """
        check_extents(image.shape[2:])
        deepest = self.swinViT(image)[-1]  # (B, D, *S / 32)
        tokens = deepest.flatten(2)  # (B, D, n)
        return Answers(
            turns=self.rotation_head(tokens[..., 0]),  # (B, 4)
            embedding=self.contrastive_head(tokens[..., 1]),  # (B, E)
            image=self.reconstruction_head(deepest),  # (B, C, *S)
        )


class _Convolution2d(nn.Conv2d):
    forward = in_float32(nn.Conv2d.forward)


class _Convolution3d(nn.Conv3d):
    forward = in_float32(nn.Conv3d.forward)


def _upsampling(depth: int, out_channels: int, spatial_dims: int) -> nn.Sequential:
    """From the deepest map to the image: convolution, instance norm, LeakyReLU and upsampling by 2, five times."""
    convolution = {2: _Convolution2d, 3: _Convolution3d}[spatial_dims]  # the deepest map is thin
    norm = Norm[Norm.INSTANCE, spatial_dims]
    mode = {2: "bilinear", 3: "trilinear"}[spatial_dims]
    widths = [depth, *(max(1, depth // 2**i) for i in (1, 2, 3, 4, 4))]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [
            convolution(before, after, kernel_size=3, padding=1),
            norm(after),
            nn.LeakyReLU(),
            nn.Upsample(scale_factor=2, mode=mode, align_corners=False),
        ]
    return nn.Sequential(*layers, convolution(widths[-1], out_channels, kernel_size=1))
