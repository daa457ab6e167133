"""Whether two files have the same voxels at the same places."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from nibabel.affines import apply_affine, voxel_sizes

from .nifti import BadCase

AGREEMENT = 1e-3
"""Tolerance of positions in mm: files store their geometry as float32."""


class Grid(NamedTuple):
    """Voxels in space.

    Attributes:
        name: what messages call it.
        shape: extents ``(X, Y, Z)``, or ``(X, Y)``.
        affine: voxel index to mm in RAS+ ``(4, 4)``.
    """

    name: object
    shape: tuple[int, ...]
    affine: np.ndarray

    def corners(self) -> np.ndarray:
        """Where the corners lie: ``(8, 3)`` in mm."""
        extents = (*self.shape, 1)[:3]
        indices = np.array(np.meshgrid(*[(0, extent - 1) for extent in extents])).reshape(3, -1).T  # (8, 3)
        return apply_affine(self.affine, indices)


def check_same(grid: Grid, reference: Grid) -> None:
    """Raise `BadCase` unless both have the same voxels at the same places, up to a hundredth of a voxel."""
    if grid.shape != reference.shape:
        raise BadCase(f"{grid.name} has {grid.shape} voxels, {reference.name} {reference.shape}; accepted is one grid")
    apart = np.abs(grid.corners() - reference.corners()).max()
    if apart > max(AGREEMENT, 1e-2 * voxel_sizes(reference.affine)[: len(reference.shape)].min()):
        raise BadCase(f"{grid.name} and {reference.name} lie {apart:.3g} mm apart at a corner; accepted is one grid")
