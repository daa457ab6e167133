"""The images of a case: read from NIfTI files, and checked before anything is made of them."""

from __future__ import annotations

import gzip
import math
from collections.abc import Collection
from pathlib import Path
from typing import IO

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from nibabel.affines import apply_affine, voxel_sizes

from ..preprocessing import finite
from .datalist import Case

GIB = 2**30
LONGEST_HEADER = 540  # bytes, of NIfTI-2
AGREEMENT = 1e-3  # mm; files keep float32 geometry


class BadCase(ValueError):
    """A case cannot be used; the message names its file."""


def read_nifti(path: Path, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Values ``(X, Y, Z)`` or ``(X, Y, Z, C)`` of a file, and its affine ``(4, 4)``, voxel index to mm in RAS+.

    What is read is what the header implies: a compressed stream that goes on after it is not followed.

    Args:
        largest: GiB that the file may take uncompressed.

    Raises:
        BadCase: the file is damaged, larger than `largest` or than its header implies, or no volume of numbers.
    """
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as stream:
            kind, size = _implied(stream)
            if size > largest * GIB:
                raise BadCase(f"{path}: takes {size / GIB:.3g} GiB by its header; accepted are {largest:g} (largest)")
            image = kind.from_stream(stream)
            values = np.asanyarray(image.dataobj)
            stream.seek(size)
            if stream.read(1):
                raise BadCase(f"{path}: is larger than its header says: it goes on after {size} bytes")
    except BadCase:
        raise
    # What a damaged file makes nibabel, gzip and NumPy raise is of many kinds; the file's name is what counts.
    except Exception as error:
        raise BadCase(f"{path}: cannot be read: {str(error).strip() or type(error).__name__}") from error
    if values.dtype.kind not in "iufb":
        raise BadCase(f"{path}: has voxels of type {values.dtype}; accepted are real numbers")
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]  # (X, Y, Z, 1) -> (X, Y, Z)
    if values.ndim not in (3, 4) or not values.size:
        raise BadCase(f"{path}: has shape {values.shape}; accepted are three axes, or four with channels last")
    affine = image.affine
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise BadCase(f"{path}: has an affine that cannot be inverted; accepted is a voxel grid in space")
    return values, affine


def _implied(stream: IO[bytes]) -> tuple[type[nibabel.Nifti1Image], int]:
    """Which kind of NIfTI begins in `stream`, and how many bytes its header implies; leaves `stream` at its start."""
    head = stream.read(LONGEST_HEADER)
    stream.seek(0)
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        if kind.header_class.may_contain_header(head):
            header = kind.header_class(head[: kind.header_class.template_dtype.itemsize])
            voxels = math.prod(map(int, header.get_data_shape()))
            return kind, int(header.get_data_offset()) + voxels * header.get_data_dtype().itemsize
    raise ValueError("is no NIfTI file")


class ReadCase(Transform):
    """`Case` to ``{"image": float32 (C, *S), "label": uint8 (1, *S)}``, MetaTensors on one grid; or without label.

    Args:
        values: label values that may occur; None reads no labels.
        channels: of the image; None accepts any number.
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
        parts, affine = [], None
        for path in case.images:
            values, place = read_nifti(path, self.largest)
            finite_or_bad(values, path)
            values = values.astype(np.float32)
            parts.append(np.moveaxis(values, -1, 0) if values.ndim == 4 else values[None])  # (C, X, Y, Z)
            if affine is None:
                affine = place
            _check_same_grid(parts[-1].shape[1:], place, path, parts[0].shape[1:], affine, case.images[0])
        image = np.concatenate(parts)  # (C, X, Y, Z)
        if self.channels is not None and len(image) != self.channels:
            raise BadCase(f"{case.images[0]}: has {len(image)} channels; the network takes {self.channels}")
        read = {"image": _tensor(image, affine)}
        if self.values is not None:
            label, place = read_nifti(case.label, self.largest)
            _check_same_grid(label.shape, place, case.label, image.shape[1:], affine, case.images[0])
            # One affine for both, whose own agree up to rounding, keeps them on one grid when they are resampled.
            read["label"] = _tensor(self._values(label, case.label)[None], affine)  # (1, X, Y, Z)
        return read

    def _values(self, label: np.ndarray, path: Path) -> np.ndarray:
        """`label` as uint8."""
        with np.errstate(invalid="ignore"):
            small = label.astype(np.uint8)
        strange = set(np.unique(label[small != label]).tolist())  # no whole numbers from 0 to 255
        counts = torch.bincount(torch.from_numpy(small.reshape(-1)), minlength=256)
        strange.update(value for value in counts.nonzero().flatten().tolist() if value not in self.values)
        if strange:
            raise BadCase(
                f"{path}: has label values {', '.join(f'{value:g}' for value in sorted(strange)[:5])}; accepted are "
                f"those of classes and of background, {sorted(self.values)}"
            )
        return small


def finite_or_bad(values: np.ndarray, path: Path) -> None:
    try:
        finite(values, str(path))
    except ValueError as error:
        raise BadCase(str(error)) from error


def _tensor(values: np.ndarray, affine: np.ndarray) -> MetaTensor:
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(values)), affine=torch.from_numpy(affine))


def _check_same_grid(shape, affine, path: Path, reference, reference_affine, reference_path: Path) -> None:
    if tuple(shape) != tuple(reference):
        raise BadCase(f"{path}: has {tuple(shape)} voxels, {reference_path} {tuple(reference)}; accepted is one grid")
    corners = np.array(np.meshgrid(*[(0, extent - 1) for extent in shape])).reshape(3, -1).T  # (8, 3)
    apart = np.abs(apply_affine(affine, corners) - apply_affine(reference_affine, corners)).max()
    if apart > max(AGREEMENT, 1e-2 * voxel_sizes(reference_affine).min()):
        raise BadCase(f"{path}: lies {apart:.3g} mm apart from {reference_path} at a corner; accepted is one grid")
