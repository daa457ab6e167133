"""The images of a case: read from NIfTI files, and checked before they are used."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform

from ..imaging.grids import Grid, check_same
from ..imaging.nifti import BadCase, as_float32, read_nifti
from ..names import some
from .datalist import Case


class ReadCase(Transform):
    """`Case` to ``{"image": float32 (C, *S), "label": uint8 (1, *S)}``, MetaTensors on one grid, or to the image.

    Args:
        values: label values that may occur; None reads no labels.
        channels: channels of the image; None accepts any number.
        largest: GiB that one file may take uncompressed.

    Raises:
        BadCase: a file is damaged, has NaN or infinite voxels, other grids, labels or channels; its name is in the
            message.
    """

    def __init__(self, values: Collection[int] | None, channels: int | None, largest: float) -> None:
        self.values = None if values is None else frozenset(values)
        self.channels = channels
        self.largest = largest

    def __call__(self, case: Case) -> dict[str, MetaTensor]:
        parts: list[np.ndarray] = []
        grids: list[Grid] = []
        for path in case.images:
            values, place = read_nifti(path, self.largest)
            values = as_float32(values, path)
            parts.append(np.moveaxis(values, -1, 0) if values.ndim == 4 else values[None])  # (C, X, Y, Z)
            grids.append(Grid(path, parts[-1].shape[1:], place))
            check_same(grids[-1], grids[0])
        image = np.concatenate(parts)  # (C, X, Y, Z)
        if self.channels is not None and len(image) != self.channels:
            raise BadCase(f"{case.images[0]}: has {len(image)} channels; the network takes {self.channels}")
        grid = grids[0]
        read = {"image": _tensor(image, grid.affine)}
        if self.values is not None:
            assert case.label is not None  # datalists that are read for labels have one for each case
            label, place = read_nifti(case.label, self.largest)
            check_same(Grid(case.label, label.shape, place), grid)
            # Their affines agree up to rounding; one affine for both keeps them on one grid when they are resampled.
            read["label"] = _tensor(_checked(label, case.label, self.values)[None], grid.affine)  # (1, X, Y, Z)
        return read


def _checked(label: np.ndarray, path: Path, values: Collection[int]) -> np.ndarray:
    """`label` as uint8, if it has no values other than `values`."""
    with np.errstate(invalid="ignore"):
        small = label.astype(np.uint8)
    other = small != label  # not whole numbers from 0 to 255
    # NumPy scalars print in full precision: a float32 just below 2 is 1.9999999.
    strange = list(np.unique(label[other]))
    whole = small[~other] if strange else small
    counts = torch.bincount(torch.from_numpy(whole.reshape(-1)), minlength=256)
    strange += [value for value in counts.nonzero().flatten().tolist() if value not in values]
    if strange:
        raise BadCase(
            f"{path}: has label values {some(strange, 5)}; accepted are those of classes and of background, "
            f"{sorted(values)}"
        )
    return small


def _tensor(values: np.ndarray, affine: np.ndarray) -> MetaTensor:
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(values)), affine=torch.from_numpy(affine))
