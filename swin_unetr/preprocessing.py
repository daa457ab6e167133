"""How an image becomes what the network sees: the same in training and prediction, so it is saved with the weights."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from . import lazily
from .files import GIB

if lazily.MYPY:
    import torch
    from monai import data, transforms
else:
    torch = lazily.Module("torch")
    data = lazily.Module("monai.data")
    transforms = lazily.Module("monai.transforms")

FINEST, COARSEST = 1e-4, 1e3
"""Extents of a voxel in mm, from microscopy to beyond any scanner."""
FLOAT64, FLOAT32 = 8, 4  # bytes


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every image, before anything random.

    Args:
        spacing: voxel extents in mm that images are resampled to; null leaves them.
        orientation: axes of the network's volume as in RAS: right, anterior, superior; null leaves them.
        intensity: window maps `window` to 0..1 and clips what is outside; zscore subtracts the mean and divides by
            the standard deviation of the voxels that are not 0, for each channel separately.
        window: lowest and highest intensity, in the image's units (HU for CT).
        crop_foreground: in training, remove borders in which the image is not above its lowest intensity.
    """

    spacing: tuple[float, float, float] | None = (1.5, 1.5, 2.0)
    orientation: str | None = "RAS"
    intensity: Literal["window", "zscore"] = "window"
    window: tuple[float, float] = (-175.0, 250.0)
    crop_foreground: bool = True

    def __post_init__(self) -> None:
        if self.spacing is not None and not (
            len(self.spacing) == 3 and all(FINEST <= extent <= COARSEST for extent in self.spacing)
        ):
            raise ValueError(
                f"spacing is {tuple(self.spacing)}; accepted are three extents in mm above 0, from {FINEST} to "
                f"{COARSEST}"
            )
        axes = {frozenset("RL"), frozenset("AP"), frozenset("SI")}
        if self.orientation is not None and (
            len(self.orientation) != 3 or {pair for pair in axes if pair & set(self.orientation)} != axes
        ):
            raise ValueError(f"orientation is {self.orientation!r}; accepted are three letters such as RAS or LPS")
        if len(self.window) != 2 or not -math.inf < self.window[0] < self.window[1] < math.inf:
            raise ValueError(f"window is {tuple(self.window)}; accepted is lowest < highest, both finite")
        if self.intensity not in ("window", "zscore"):
            raise ValueError(f"intensity is {self.intensity!r}; accepted are 'window' and 'zscore'")

    def geometry(self, keys: Sequence[str]) -> list[transforms.Orientationd | transforms.Spacingd]:
        """Orientation and spacing of ``(C, *S)`` MetaTensors: ``image`` linearly, every other key by nearest voxel."""
        steps: list[transforms.Orientationd | transforms.Spacingd] = []
        if self.orientation is not None:
            steps.append(transforms.Orientationd(keys, axcodes=self.orientation, labels=None))
        if self.spacing is not None:
            mode = ["bilinear" if key == "image" else "nearest" for key in keys]
            steps.append(transforms.Spacingd(keys, pixdim=self.spacing, mode=mode))
        return steps

    def check_grid(self, image: data.MetaTensor, largest: float) -> None:
        """Raise `ValueError` if `geometry` cannot resample ``image (C, *S)``: the extents of its voxels are out of
        range, or resampling takes more than `largest` GiB."""
        extents = " × ".join(f"{float(extent):.3g}" for extent in image.pixdim)
        if self.spacing is not None and not all(FINEST <= extent <= COARSEST for extent in image.pixdim):
            raise ValueError(
                f"the image's voxels are of {extents} mm by its header; accepted are extents from {FINEST:g} to "
                f"{COARSEST:g} mm"
            )
        outline = data.MetaTensor(torch.zeros(()).expand(image.shape), affine=image.affine)  # takes no memory
        item: dict[Hashable, Any] = {"image": outline}
        for step in self.geometry(("image",)):
            before = item["image"].peek_pending_affine(), tuple(item["image"].peek_pending_shape())
            item = step(item, lazy=True)
        grid = tuple(int(extent) for extent in item["image"].peek_pending_shape())
        # MONAI leaves an image that already has the spacing as it is.
        resampled = self.spacing is not None and not (
            before[1] == grid and torch.allclose(item["image"].peek_pending_affine(), before[0], atol=1e-3)
        )
        voxel = resampling(len(image)) if resampled else FLOAT32 * len(image)  # bytes
        size = voxel * math.prod(grid) if min(grid) > 0 else math.inf  # what overflows comes out negative
        if size > largest * GIB:
            raise ValueError(
                f"the image takes {size / GIB:.3g} GiB on the network's grid of {' × '.join(map(str, grid))} voxels"
                f"{', coordinates for its resampling included' if resampled else ''}; accepted are {largest:g} "
                f"(largest). By its header its voxels are of {extents} mm: is that right?"
            )

    def scale(self) -> list[transforms.Transform]:
        """Intensities of the key ``image``, ``(C, *S)``."""
        if self.intensity == "zscore":
            return [transforms.NormalizeIntensityd("image", nonzero=True, channel_wise=True)]
        return [transforms.ScaleIntensityRanged("image", *self.window, 0.0, 1.0, clip=True)]


def resampling(channels: int) -> int:
    """The most bytes MONAI needs for each voxel that it resamples to: for three coordinates made from four; for these
    and the channels; or for the channels as they are computed and as they are kept."""
    return max((4 + 3) * FLOAT64, (3 + channels) * FLOAT64, channels * (FLOAT64 + FLOAT32))
