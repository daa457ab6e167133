"""What the encoder sees of a crop in pretraining: a rotated view with pieces cut out.

Source of the recipe: Tang et al., "Self-Supervised Pre-Training of Swin Transformers for 3D Medical Image
Analysis", https://arxiv.org/abs/2111.14791.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .options import Cutout, check_rotation

QUARTER_TURNS = 4
"""Classes of the rotation task: 0°, 90°, 180° and 270°."""


@dataclass(frozen=True)
class View:
    """A batch of views, one of each crop.

    Attributes:
        image: what the encoder sees ``(B, C, *S)``.
        whole: the rotated crops with nothing cut out ``(B, C, *S)``: the target of reconstruction.
        cut: where `image` was cut out, bool ``(B, 1, *S)``.
        turns: quarter turns, int64 ``(B,)`` in 0..3: the target of the rotation task.
    """

    image: torch.Tensor
    whole: torch.Tensor
    cut: torch.Tensor
    turns: torch.Tensor


def view(crops: torch.Tensor, cutout: Cutout, rotation_axes: Sequence[int], random: np.random.Generator) -> View:
    """A random view of each of `crops` ``(B, C, *S)``, whose values lie in 0..1.

    Args:
        rotation_axes: the two spatial axes (0 is the first after the channels) that span the plane of rotation.
        random: decides everything; the same state gives the same view on every device.

    Raises:
        ValueError: the crops are longer on one of `rotation_axes` than on the other.
    """
    check_rotation(crops.shape[2:], rotation_axes)
    turns = random.integers(QUARTER_TURNS, size=crops.shape[0])
    planes = [axis + 1 for axis in rotation_axes]  # of one crop (C, *S)
    whole = torch.stack([crop.rot90(int(k), planes) for crop, k in zip(crops, turns, strict=True)])  # (B, C, *S)
    image, cut = cut_out(whole, cutout, random)
    return View(image, whole, cut, torch.from_numpy(turns).to(crops.device))


def cut_out(whole: torch.Tensor, cutout: Cutout, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`whole` ``(B, C, *S)`` with blocks replaced, and where, bool ``(B, 1, *S)``."""
    image, cut = whole.clone(), torch.zeros_like(whole[:, :1], dtype=torch.bool)
    batch, extents = whole.shape[0], np.array(whole.shape[2:])
    smallest, largest = (np.maximum(1, np.floor(part * extents)).astype(int) for part in cutout.block)
    for i in range(batch):
        budget = random.uniform(0, cutout.max_fraction) * extents.prod()
        while True:
            size = random.integers(smallest, largest, endpoint=True)
            budget -= size.prod()
            if budget < 0:
                break
            start = random.integers(0, extents - size, endpoint=True)
            block = (slice(None), *(slice(a, a + n) for a, n in zip(start, size, strict=True)))
            if batch == 1 or random.random() < cutout.noise:
                image[i][block] = _noise((whole.shape[1], *size), random).to(whole)
            else:
                other = (i + random.integers(1, batch)) % batch
                image[i][block] = whole[other][block]
            cut[i][block] = True
    return image, cut


def _noise(shape: Sequence[int], random: np.random.Generator) -> torch.Tensor:
    """Normal noise, stretched to 0..1 as the crops are."""
    noise = random.standard_normal(shape, dtype=np.float32)
    spread = noise.max() - noise.min()
    return torch.from_numpy((noise - noise.min()) / spread if spread > 0 else np.full_like(noise, 0.5))
