"""Planes of a volume as pictures, in radiological view: the patient's right on the left, front and head on top."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patheffects import withStroke

# Axis that is cut, then the axes that run right and up, in RAS+; the letters stand left, right, top and bottom.
PLANES = {
    "axial": (2, 0, 1, "RLAP"),
    "coronal": (1, 0, 2, "RLSI"),
    "sagittal": (0, 1, 2, "APSI"),
}


def to_ras(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """`volume` with its axes turned to right, anterior, superior."""
    return nibabel.apply_orientation(volume, nibabel.io_orientation(affine))


def ras_spacing(affine: np.ndarray) -> np.ndarray:
    """Voxel extents in mm along right, anterior, superior."""
    axes = nibabel.io_orientation(affine)[:, 0].astype(int)
    spacing = np.empty(3)
    spacing[axes] = nibabel.affines.voxel_sizes(affine)
    return spacing


def slice_of(volume: np.ndarray, normal: int, index: int, right: int, up: int) -> np.ndarray:
    """One slice as an image: rows from the top, and the patient's right (or front) on the left."""
    plane = np.take(volume, index, axis=normal)  # the remaining two axes, in rising order
    if right > up:
        plane = plane.T
    # RAS+ indices rise to the patient's right, front and head; the picture has those left, left and on top.
    return plane.T[::-1, ::-1]


def tint(mask: np.ndarray, colour: str, alpha: float) -> np.ndarray:
    """`mask` in one colour, transparent elsewhere: ``(rows, columns, 4)``."""
    image = np.zeros((*mask.shape, 4))
    image[mask] = (*to_rgb(colour), alpha)
    return image


def write_letters(axes, letters: Sequence[str]) -> None:
    """Say on `axes` which side of the patient is where."""
    places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.97), (0.5, 0.03))
    for letter, (x, y) in zip(letters, places, strict=True):
        text = axes.text(x, y, letter, transform=axes.transAxes, color="white", fontsize=9, ha="center", va="center")
        text.set_path_effects([withStroke(linewidth=2.5, foreground="#101418")])
