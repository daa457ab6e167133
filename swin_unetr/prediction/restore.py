"""From the network's grid back to the image's: linear interpolation of probabilities, a slab at a time, then decisions.

Both grids are parallel (orientation and spacing permute, mirror and scale axes), so axes are interpolated one after the
other. Those of an image with shear (a CT with a tilted gantry) are not, and are interpolated in space at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample

from ..labels import Labels


@dataclass(frozen=True)
class Axis:
    """Where an axis of the image runs in the network's grid.

    Attributes:
        along: axis of the network's grid.
        low, high: rows between which each of the image's planes lies, int64 ``(extent,)``.
        weight: weight of the higher row, float32 ``(extent,)``.
        shorter: whether the image has fewer planes than the grid has rows.
    """

    along: int
    low: torch.Tensor
    high: torch.Tensor
    weight: torch.Tensor
    shorter: bool


def axes_between(
    image_affine: np.ndarray, shape: Sequence[int], affine: np.ndarray, grid: Sequence[int]
) -> list[Axis] | None:
    """The axes of an image of `shape` in a `grid`, from both affines ``(4, 4)``; planes beyond the grid get its border.

    None if the grids are not parallel.
    """
    between = np.linalg.inv(affine) @ image_affine  # image's index to grid's index
    found = []
    for axis, extent in enumerate(shape):
        column = between[:3, axis]
        along = int(np.abs(column).argmax())
        if np.abs(np.delete(column, along)).max() * extent > 0.05:
            return None
        place = np.clip(between[along, 3] + column[along] * np.arange(extent), 0, grid[along] - 1)
        low = np.clip(np.floor(place).astype(np.int64), 0, max(grid[along] - 2, 0))
        high = np.minimum(low + 1, grid[along] - 1)
        weight = torch.from_numpy((place - low).astype(np.float32))
        found.append(Axis(along, torch.from_numpy(low), torch.from_numpy(high), weight, extent < grid[along]))
    return found


class Restored:
    """The label map of an image, decided plane by plane as slabs of probabilities arrive.

    Attributes:
        labels: uint8 ``(X, Y, Z)``.
        entropy: float32 ``(X, Y, Z)`` in 0..1, or None.
    """

    def __init__(self, shape: Sequence[int], axes: Sequence[Axis] | None, labels: Labels, entropy: bool) -> None:
        self.labels = np.zeros(shape, np.uint8)
        self.entropy = np.zeros(shape, np.float32) if entropy else None
        self._options = labels
        self._axes = axes or []
        self._sliced = next((i for i, axis in enumerate(self._axes) if axis.along == 0), 0)
        self._others = [axis for axis in self._axes if axis.along != 0]
        self._last: torch.Tensor | None = None  # the last row before the slab

    def add(self, first: int, probabilities: torch.Tensor) -> None:
        """Add the rows from `first` on, ``(channels, rows, *grid[1:])``; slabs come in order and without gaps."""
        # An axis that becomes shorter is interpolated here, for all planes at once; one that becomes longer, in each
        # plane.
        for axis in self._others:
            if axis.shorter:
                probabilities = _interpolate(probabilities, axis)
        if self._last is not None:
            first, probabilities = first - 1, torch.cat([self._last, probabilities], dim=1)
        self._last = probabilities[:, -1:].clone()
        end = first + probabilities.shape[1]
        sliced = self._axes[self._sliced]
        # Planes whose higher row is in this slab and in no earlier one.
        reached = sliced.high < end
        new = reached & (sliced.high > first) if first else reached
        for plane in torch.nonzero(new).flatten().tolist():
            low, high = int(sliced.low[plane]) - first, int(sliced.high[plane]) - first
            row = torch.lerp(probabilities[:, low], probabilities[:, high], float(sliced.weight[plane]))
            self._decide(plane, row)

    def _decide(self, plane: int, row: torch.Tensor) -> None:
        """Decide on a plane of the image from ``row (channels, grid[1], grid[2])``, in which shorter axes are already
        the image's."""
        # The shorter result first, so that the second interpolation reads less.
        for axis in sorted(self._others, key=lambda axis: len(axis.low)):
            if not axis.shorter:
                row = _interpolate(row, axis)
        if self._others[0].along > self._others[1].along:
            row = row.transpose(1, 2)
        self._keep(tuple(plane if i == self._sliced else slice(None) for i in range(3)), row)

    def add_whole(self, probabilities: torch.Tensor, affine: np.ndarray, image_affine: np.ndarray) -> None:
        """Add all rows at once, ``(channels, *grid)``, for grids that are not parallel."""
        resample = SpatialResample(mode="bilinear", padding_mode="border")
        found = resample(
            MetaTensor(probabilities, affine=torch.from_numpy(affine)),
            dst_affine=torch.from_numpy(image_affine),
            spatial_size=self.labels.shape,
        )  # (channels, X, Y, Z)
        self._keep(..., torch.as_tensor(found).float())

    def _keep(self, where, probabilities: torch.Tensor) -> None:
        """Decide on a part of the image from ``probabilities (channels, *S)``."""
        decided = self._options.decide_by_probabilities(probabilities[None])
        self.labels[where] = self._options.label_map(decided)[0, 0].cpu().numpy()
        if self.entropy is not None:
            self.entropy[where] = entropy(probabilities, self._options.overlapping).cpu().numpy()


def _interpolate(values: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Interpolate ``values (..., grid[1], grid[2])`` along `axis`, one of these two, to the image's places."""
    dim = axis.along - 3
    low, high, weight = (part.to(values.device) for part in (axis.low, axis.high, axis.weight))
    weight = weight.view(-1, *[1] * (2 - axis.along))
    return torch.lerp(values.index_select(dim, low), values.index_select(dim, high), weight)


def entropy(probabilities: torch.Tensor, overlapping: bool) -> torch.Tensor:
    """Shannon entropy of ``probabilities (channels, *S)`` as a fraction of the largest possible: ``(*S)`` in 0..1.

    For overlapping classes, the mean of their entropies.
    """
    if overlapping:
        return (torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)).mean(0) / math.log(2)
    return torch.special.entr(probabilities).sum(0) / math.log(len(probabilities))
