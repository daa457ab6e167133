"""The tasks of pretraining, as options of the command."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

TASKS = ("rotation", "contrast", "reconstruction")
STRIDE = 32  # voxels of the image in one token of the deepest map, an axis


@dataclass(frozen=True)
class Cutout:
    """How much of a view is cut out, and in which pieces.

    Args:
        max_fraction: a view loses a fraction of its voxels that is drawn between 0 and this.
        block: smallest and largest extent of a block, as parts of the view's extent, drawn for each axis.
        noise: probability that a block is filled with noise; otherwise with what another crop of the batch has there.
            In a batch of one crop it is always noise.
    """

    max_fraction: float = 0.3
    block: tuple[float, float] = (0.05, 0.25)
    noise: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.max_fraction < 1:
            raise ValueError(f"max_fraction is {self.max_fraction}; accepted is 0 ≤ max_fraction < 1")
        if not 0 < self.block[0] <= self.block[1] <= 1:
            raise ValueError(f"block is {tuple(self.block)}; accepted is 0 < smallest ≤ largest ≤ 1")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise is {self.noise}; accepted is a probability from 0 to 1")


@dataclass(frozen=True)
class Tasks:
    """The tasks of pretraining and their weights.

    Args:
        rotation: weight of the rotation's cross-entropy.
        contrast: weight of NT-Xent.
        reconstruction: weight of the L1 distance.
        region: where the distance is measured: in the whole view, or where it was cut out.
        temperature: temperature of NT-Xent.
        rotation_axes: the two spatial axes that span the plane of rotation; crops have equal extents along both.
        cutout: what is cut out of a view.
    """

    rotation: float = 1.0
    contrast: float = 1.0
    reconstruction: float = 1.0
    region: Literal["whole", "masked"] = "whole"
    temperature: float = 0.5
    rotation_axes: tuple[int, int] = (1, 2)
    cutout: Cutout = field(default_factory=Cutout)

    def __post_init__(self) -> None:
        weights = [getattr(self, name) for name in TASKS]
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(
                f"weights of {', '.join(TASKS)} are {weights}; accepted are numbers ≥ 0, not all of them 0"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is {self.temperature}; accepted is a number above 0")
        if self.region not in ("whole", "masked"):
            raise ValueError(f"region is {self.region!r}; accepted are 'whole' and 'masked'")
        if self.region == "masked" and self.reconstruction and not self.cutout.max_fraction:
            raise ValueError("region is 'masked' and cutout.max_fraction 0; accepted is a fraction above 0")

    def check(self, roi: Sequence[int]) -> None:
        """Raise `ValueError` unless crops of `roi` voxels can be pretrained on."""
        check_extents(roi)
        check_rotation(roi, self.rotation_axes)


def check_rotation(extents: Sequence[int], rotation_axes: Sequence[int]) -> None:
    """Raise `ValueError` unless a quarter turn in the plane of `rotation_axes` keeps `extents`."""
    accepted = range(len(extents))
    if len(rotation_axes) != 2 or len(set(rotation_axes)) != 2 or not set(rotation_axes) <= set(accepted):
        raise ValueError(
            f"rotation_axes is {tuple(rotation_axes)}; accepted are two different axes of {tuple(accepted)}"
        )
    first, second = (extents[axis] for axis in rotation_axes)
    if first != second:
        raise ValueError(
            f"rotation_axes is {tuple(rotation_axes)}, along which crops of {tuple(extents)} voxels have {first} and "
            f"{second}; a quarter turn needs them equal"
        )


def check_extents(extents: Sequence[int]) -> None:
    """Raise `ValueError` unless a crop of `extents` voxels can be pretrained on."""
    if any(extent % STRIDE or extent < STRIDE for extent in extents):
        raise ValueError(f"roi is {tuple(extents)}; accepted are multiples of {STRIDE} on every axis")
    if math.prod(extents) == STRIDE ** len(extents):
        raise ValueError(
            f"roi is {tuple(extents)}, whose deepest feature map is a single voxel: instance norm makes zero of it and "
            f"contrast has no token of its own; accepted is a roi with at least one axis of {2 * STRIDE} or more"
        )
