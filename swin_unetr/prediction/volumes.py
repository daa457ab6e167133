"""A label map in numbers: volumes of organs, their intensities, and what looks wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..labels import Labels

BORDERS = (("left", "right"), ("back", "front"), ("bottom", "top"))
CUT = 25.0
"""Area in mm² of an organ on a face of the image from which on it counts as cut."""
EXTREME_SPACING = (0.1, 10.0)
ANISOTROPY = 20.0


@dataclass(frozen=True)
class Organ:
    """A class in one image.

    Attributes:
        values: values of the label map that belong to it.
        mean, std: of the image's first channel inside it, in the image's unit (HU for CT); NaN if it is empty.
        cut: faces of the image that it touches, by the side of the patient they lie on.
    """

    name: str
    values: tuple[int, ...]
    voxels: int
    millilitres: float
    mean: float
    std: float
    cut: tuple[str, ...]


def measure(labels: np.ndarray, image: np.ndarray, affine: np.ndarray, options: Labels) -> list[Organ]:
    """Each class of ``labels (X, Y, Z)`` in ``image (X, Y, Z)``; overlapping classes include those inside them.

    Args:
        affine: voxel index to mm in RAS+ ``(4, 4)``.
    """
    voxel = abs(float(np.linalg.det(affine[:3, :3])))  # mm³
    return [_organ(name, values, labels, image, affine, voxel) for name, values in _values(options).items()]


def _values(options: Labels) -> dict[str, tuple[int, ...]]:
    """By class, the values that `Labels.label_map` writes for it and, if classes overlap, for those inside it."""
    written = dict(zip(options.names, options.written(), strict=True))
    if not options.overlapping:
        return {name: (value,) for name, value in written.items()}
    return {
        name: tuple(written[other] for other, inner in options.groups.items() if set(inner) <= set(values))
        for name, values in options.groups.items()
    }


def _organ(name, values, labels: np.ndarray, image: np.ndarray, affine: np.ndarray, voxel: float) -> Organ:
    mask = np.isin(labels, values)
    voxels = int(np.count_nonzero(mask))
    inside = image[mask]
    return Organ(
        name=name,
        values=values,
        voxels=voxels,
        millilitres=voxels * voxel / 1000,
        mean=float(inside.mean(dtype=np.float64)) if voxels else math.nan,
        std=float(inside.std(dtype=np.float64)) if voxels else math.nan,
        cut=_cut(mask, affine) if voxels else (),
    )


def _cut(mask: np.ndarray, affine: np.ndarray) -> tuple[str, ...]:
    """Faces of the image on which `mask` has more than `CUT` mm², named after the patient's sides."""
    found = []
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    for axis in range(3):
        direction = affine[:3, axis]
        patient = int(np.abs(direction).argmax())
        sides = BORDERS[patient] if direction[patient] > 0 else BORDERS[patient][::-1]
        area = float(np.prod(np.delete(spacing, axis)))
        for index, side in zip((0, -1), sides, strict=True):
            if np.count_nonzero(mask.take(index, axis=axis)) * area > CUT:
                found.append(side)
    return tuple(found)


def warnings(organs: Sequence[Organ], spacing: Sequence[float]) -> list[str]:
    """What a reader should know before trusting the numbers."""
    found = [
        f"{organ.name} is cut by the image's border ({', '.join(organ.cut)}): its volume is that of the part inside"
        for organ in organs
        if organ.cut
    ]
    found += [f"{organ.name} was not found" for organ in organs if not organ.voxels]
    low, high = EXTREME_SPACING
    shown = " × ".join(f"{extent:.3g}" for extent in spacing)
    if min(spacing) < low or max(spacing) > high:
        found.append(f"voxels of {shown} mm are implausible: volumes may be wrong")
    elif max(spacing) / min(spacing) > ANISOTROPY:
        found.append(f"voxels of {shown} mm are very unlike in their extents: surfaces are coarse")
    return found
