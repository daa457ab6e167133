"""Label maps on disk: finding each prediction's label, and reading both."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.affines import voxel_sizes

from ..foreign import listed
from ..imaging.grids import Grid, check_same
from ..imaging.itk import read_itk
from ..imaging.nifti import read_any
from ..imaging.suffixes import LABEL_MAPS, NIFTI, case_name

LARGEST = 16.0  # GiB
INT32 = np.iinfo(np.int32)
MOST_CLASSES = 64
"""Most values of a label map that become classes by default: an image has more."""
MOST_VALUES = 1024
"""Most values that a label map may have: more than any atlas has."""


@dataclass(frozen=True)
class LabelMap:
    """A label map and where it lies.

    Attributes:
        values: integers ``(X, Y, Z)``, or ``(X, Y)``.
        affine: voxel index to mm in RAS+ ``(4, 4)``.
    """

    values: np.ndarray
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel extents in mm."""
        return tuple(float(extent) for extent in voxel_sizes(self.affine)[: self.values.ndim])


def find(folder: Path) -> dict[str, Path]:
    """The label maps directly in `folder`, by name without suffix; hidden files are ignored.

    Raises:
        ValueError: `folder` is not a folder or has no label maps, or two of them have the same name.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder")
    found: dict[str, Path] = {}
    for path in listed(folder):
        if path.name.startswith(".") or not path.name.endswith(LABEL_MAPS):
            continue
        name = case_name(path)
        if name in found:
            raise ValueError(f"{found[name]} and {path} are both case {name!r}")
        found[name] = path
    if not found:
        raise ValueError(f"{folder} has no label maps; accepted are files that end in {', '.join(LABEL_MAPS)}")
    return found


def pair(predictions: Mapping[str, Path], labels: Iterable[str]) -> dict[str, Path]:
    """The prediction for each of `labels` that has one: with the same name, or that name followed by ``_…``.

    A prediction belongs to the longest name that fits: ``liver_10_seg`` to ``liver_10``, never to ``liver_1``.

    Raises:
        ValueError: two predictions belong to one label.
    """
    names = set(labels)
    found: dict[str, Path] = {}
    for name, path in predictions.items():
        parts = name.split("_")
        starts = ("_".join(parts[:n]) for n in range(len(parts), 0, -1))
        label = next((start for start in starts if start in names), None)
        if label is None:
            continue
        if label in found:
            raise ValueError(f"{found[label]} and {path} are both predictions of case {label!r}")
        found[label] = path
    return found


def read(path: Path, largest: float = LARGEST) -> LabelMap:
    """The label map in a file.

    Args:
        largest: GiB that it may take uncompressed.

    Raises:
        ValueError: the file is damaged, too large or not a label map; the message names it.
    """
    if path.name.endswith(NIFTI):
        values, affine, _ = read_any(path, largest)
    else:
        values, affine = _read_itk(path, largest)
    if values.ndim not in (2, 3):
        raise ValueError(f"{path}: has shape {values.shape}; accepted is a label map of 2 or 3 axes")
    if not np.issubdtype(values.dtype, np.integer):
        other = values[(np.rint(values) != values) | (np.abs(values) > INT32.max)]
        if other.size:
            raise ValueError(f"{path}: has values that are not integers, such as {other[0]!s}; accepted is a label map")
        values = values.astype(np.int32)
    # The range first, since counting values takes longer.
    if int(values.max()) - int(values.min()) > MOST_VALUES:
        check_values(path, values, MOST_VALUES)
    return LabelMap(values, affine)


def check_values(path: Path, values: np.ndarray, most: int, hint: str = "") -> set[int]:
    """The different `values` of a label map.

    Raises:
        ValueError: there are more than `most`: the file is an image.
    """
    found = np.unique(values)
    if len(found) > most:
        raise ValueError(
            f"{path}: has {len(found)} different values, from {found[0]} to {found[-1]}: is it an image? Accepted are "
            f"label maps of up to {most} values{hint}"
        )
    return {int(value) for value in found}


def check_same_grid(prediction: LabelMap, label: LabelMap) -> None:
    """Raise `ValueError` unless both have the same voxels at the same places."""
    check_same(*(Grid(name, of.values.shape, of.affine) for name, of in (("prediction", prediction), ("label", label))))


def _read_itk(path: Path, largest: float) -> tuple[np.ndarray, np.ndarray]:
    values, affine = read_itk(path, largest)  # (X, Y[, Z], C)
    if values.shape[-1] != 1:
        raise ValueError(f"{path}: has {values.shape[-1]} components a voxel; accepted is one")
    return values[..., 0], affine
