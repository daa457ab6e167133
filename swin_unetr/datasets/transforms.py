"""What is done to a case: once, the same at every visit; and at random, for each draw."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
import torch
from monai import transforms
from monai.data import MetaTensor
from monai.transforms.utils import map_binary_to_indices

from ..preprocessing import Preprocessing
from .images import BadCase, ReadCase
from .options import Augmentation, Data

CENTRES = 1 << 16
"""Voxels of each kind that crops are centred on, drawn once for each case: the indices of all would take more memory
than the image."""


def preprocess(read: ReadCase, preprocessing: Preprocessing) -> list[transforms.Transform]:
    """`Case` to image and label ``(C, *S)`` on the grid and in the intensities that the network sees."""
    keys = ("image",) if read.values is None else ("image", "label")
    return [read, Fits(preprocessing, read.largest), *preprocessing.geometry(keys), *preprocessing.scale()]


class Fits(transforms.Transform):
    """Refuse a case whose image takes more than `largest` GiB on the grid to which it is resampled."""

    def __init__(self, preprocessing: Preprocessing, largest: float) -> None:
        self.preprocessing = preprocessing
        self.largest = largest

    def __call__(self, case: dict[str, MetaTensor]) -> dict[str, MetaTensor]:
        self.preprocessing.check_grid(case["image"], self.largest)
        return case


def _plain(keys: Sequence[str]) -> list[transforms.Transform]:
    """Plain tensors of `keys` in the types of a batch, without MONAI's metadata."""
    types = [torch.float32 if key == "image" else torch.uint8 for key in keys]
    return [
        transforms.CastToTyped(keys, types),
        transforms.ToTensord(keys, track_meta=False),
        transforms.SelectItemsd(keys),
    ]


def for_validation(read: ReadCase, preprocessing: Preprocessing) -> transforms.Compose:
    """`Case` to ``{"image": (C, *S), "label": (1, *S)}`` as plain tensors."""
    keys = ("image",) if read.values is None else ("image", "label")
    return transforms.Compose([*preprocess(read, preprocessing), *_plain(keys)])


def for_cropping(
    read: ReadCase, preprocessing: Preprocessing, data: Data, roi: Sequence[int], labelled: Collection[int]
) -> transforms.Compose:
    """`Case` to what crops are drawn from: no smaller than `roi`, as plain tensors, with voxels for their centres.

    Args:
        labelled: label values that crops are centred on; empty without labels.
    """
    keys = ("image", "label") if labelled else ("image",)
    steps = preprocess(read, preprocessing)
    if preprocessing.crop_foreground:
        steps.append(transforms.CropForegroundd(keys, "image", select_fn=partial(not_air, threshold=0.0)))
    steps += [transforms.SpatialPadd(keys, spatial_size=roi), *_plain(keys)]
    if data.crop == "labelled":
        steps.append(Centres(labelled, data.image_threshold))
    return transforms.Compose(steps)


def draw(data: Data, roi: Sequence[int], labelled: bool) -> transforms.Compose:
    """From the result of `for_cropping` to a list of `crops_per_volume` random crops: ``{"image": (C, *roi), "label":
    …}``.

    None of its steps writes into its input.
    """
    keys = ("image", "label") if labelled else ("image",)
    crop: transforms.Transform
    if data.crop == "labelled":
        crop = transforms.RandCropByPosNegLabeld(
            keys,
            label_key=keys[-1],
            spatial_size=roi,
            pos=data.positive,
            neg=data.negative,
            num_samples=data.crops_per_volume,
            fg_indices_key="foreground",
            bg_indices_key="background",
        )
    else:
        crop = transforms.RandSpatialCropSamplesd(keys, roi, num_samples=data.crops_per_volume, random_size=False)
    return transforms.Compose([crop, *_augment(data.augmentation, keys, roi), *_plain(keys)])


def _augment(how: Augmentation, keys: Sequence[str], roi: Sequence[int]) -> list[transforms.Transform]:
    steps: list[transforms.Transform] = []
    if how.affine:
        modes = ["bilinear" if key == "image" else "nearest" for key in keys]
        steps.append(
            transforms.RandAffined(
                keys,
                prob=how.affine,
                rotate_range=(0.0, 0.0, np.deg2rad(how.degrees)),
                scale_range=(how.zoom,) * 3,
                mode=modes,
                padding_mode="zeros",
            )
        )
    if how.flip:
        steps += [transforms.RandFlipd(keys, prob=how.flip, spatial_axis=axis) for axis in range(3)]
    if how.rotate90:
        steps.append(transforms.RandRotate90d(keys, prob=how.rotate90, max_k=3, spatial_axes=square_plane(roi)))
    if how.intensity:
        steps.append(transforms.RandScaleIntensityd("image", factors=how.intensity_scale, prob=how.intensity))
        steps.append(transforms.RandShiftIntensityd("image", offsets=how.intensity_shift, prob=how.intensity))
    if how.noise:
        steps.append(transforms.RandGaussianNoised("image", prob=how.noise, std=how.noise_std))
    return steps


def square_plane(roi: Sequence[int]) -> tuple[int, int]:
    """The first two axes that are equally long, so that a quarter turn of them keeps the shape."""
    for plane in ((0, 1), (0, 2), (1, 2)):
        if roi[plane[0]] == roi[plane[1]]:
            return plane
    raise ValueError(f"rotate90 is above 0 and roi {tuple(roi)} has no two equal extents; accepted is rotate90 = 0")


def not_air(image: torch.Tensor, threshold: float) -> torch.Tensor:
    """Where the magnitude of ``image (C, *S)`` exceeds `threshold` in any channel: bool ``(1, *S)``.

    After a window, 0 is its lowest intensity; after the z-score, it is what was 0 before.

    Raises:
        BadCase: there is no such voxel.
    """
    mask = (image.abs() > threshold).any(dim=0, keepdim=True)  # (1, *S)
    if not mask.any():
        raise BadCase(
            f"no voxel of the image is beyond {threshold:g} after preprocessing: is the window the right one?"
        )
    return mask


class Centres(transforms.Transform):
    """Adds the voxels that crops are centred on: ``foreground`` and ``background``, each int64 ``(CENTRES,)``.

    Foreground is labelled; background is neither labelled nor air. If one kind is missing, the other takes its place.
    Without labels both are what is not air.
    """

    def __init__(self, labelled: Collection[int], threshold: float) -> None:
        self.labelled = torch.tensor(sorted(labelled), dtype=torch.uint8)
        self.threshold = threshold

    def __call__(self, case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inside = not_air(case["image"], self.threshold)
        mask = torch.isin(case["label"], self.labelled) if len(self.labelled) else inside  # (1, *S)
        foreground, background = map_binary_to_indices(mask, inside.float(), image_threshold=0.5)
        if not len(background):
            background = foreground
        if not len(foreground):
            foreground = background
        generator = torch.Generator().manual_seed(0)
        chosen = [
            torch.as_tensor(indices)[torch.randint(len(indices), (CENTRES,), generator=generator)]
            for indices in (foreground, background)
        ]
        return {**case, "foreground": chosen[0], "background": chosen[1]}
