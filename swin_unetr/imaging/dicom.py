"""Series of DICOM slices: told apart, sorted in space, and refused where a slice is missing.

Source: DICOM PS3.3, C.7.6.2 (Image Plane Module), for the equation from pixels to patient coordinates.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.errors import InvalidDicomError

from .itk import TO_RAS
from .nifti import GIB, BadCase

TAGS = (
    "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "EchoNumbers", "EchoTime", "ImageOrientationPatient",
    "ImagePositionPatient", "PixelSpacing", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
)  # fmt: skip
UNEVEN = 0.02
"""Part of the distance of slices that one distance may differ from the others."""
PARALLEL = 1e-3
"""How much the components of a direction may differ between slices of one volume."""


@dataclass(frozen=True)
class Slice:
    """A file and what it says of its place: mm in LPS, as DICOM has them."""

    path: Path
    header: pydicom.Dataset

    @property
    def axes(self) -> np.ndarray:
        """Directions of rows and columns: ``(2, 3)``."""
        return np.array(self.header.ImageOrientationPatient, float).reshape(2, 3)

    @property
    def position(self) -> np.ndarray:
        return np.array(self.header.ImagePositionPatient, float)


@dataclass(frozen=True)
class Series:
    """Slices of one acquisition.

    Attributes:
        name: from series number, description and what else tells it from others in the folder; no patient's data.
    """

    name: str
    slices: tuple[Slice, ...]


def find(folder: Path) -> list[Series]:
    """The series among the files in `folder` and below it; files that are no images in DICOM are left out.

    Slices of one series that differ in echo, orientation, extents or extents of pixels are series of their own.

    Raises:
        BadCase: the header of a DICOM file is damaged.
    """
    groups: dict[tuple, list[Slice]] = defaultdict(list)
    planes: list[tuple[float, ...]] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
            if "SeriesInstanceUID" in header and "Rows" in header:
                groups[_kind(header, planes)].append(Slice(path, header))
        except InvalidDicomError:
            continue
        # Without its header nobody knows which series would lack this slice.
        except (OSError, EOFError, ValueError, TypeError) as error:
            raise BadCase(f"{path}: cannot be read: {str(error).strip() or type(error).__name__}") from error
    labels = {key: _label(slices[0].header) for key, slices in groups.items()}
    shared = Counter(labels.values())
    names, taken = {}, Counter()
    for key, label in labels.items():
        taken[label] += 1
        names[key] = label if shared[label] == 1 else f"{label}_{_difference(key, groups)}_{taken[label]}"
    return [Series(names[key], tuple(slices)) for key, slices in groups.items()]


def _kind(header: pydicom.Dataset, planes: list[tuple[float, ...]]) -> tuple:
    """What slices of one volume have in common; an orientation like none of `planes` is added to them."""
    own = tuple(float(x) for x in header.get("ImageOrientationPatient") or ())
    alike = (plane for plane in planes if len(plane) == len(own) and np.allclose(plane, own, rtol=0, atol=PARALLEL))
    orientation = next(alike, None)
    if orientation is None:
        orientation = own
        planes.append(own)
    echo = str(header.get("EchoNumbers", "")), str(header.get("EchoTime", ""))
    pixel = tuple(round(float(x), 4) for x in header.get("PixelSpacing") or ())
    return str(header.SeriesInstanceUID), echo, orientation, int(header.Rows), int(header.Columns), pixel


def _label(header: pydicom.Dataset) -> str:
    parts = ["series", str(header.get("SeriesNumber") or ""), str(header.get("SeriesDescription") or "")]
    return re.sub(r"[^A-Za-z0-9]+", "_", "_".join(part for part in parts if part)).strip("_").lower()


def _difference(key: tuple, groups: dict[tuple, list[Slice]]) -> str:
    """What tells a group from the others of its series: its echo, the plane it lies in, or its extents."""
    _, echo, orientation, rows, columns, _ = key
    siblings = [other for other in groups if other[0] == key[0]]
    if len({other[1] for other in siblings}) > 1:
        return f"echo{re.sub(r'[^0-9.]+', '', echo[0] or echo[1])}"
    if len({other[2] for other in siblings}) > 1 and len(orientation) == 6:
        normal = np.abs(np.cross(orientation[:3], orientation[3:]))
        return ("sagittal", "coronal", "axial")[int(normal.argmax())]
    return f"{columns}x{rows}"


def read(series: Series, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Values float32 ``(1, X, Y, Z)`` of a series, rescaled to HU (or its unit), and the affine ``(4, 4)`` to RAS+.

    Args:
        largest: GiB that it may take.

    Raises:
        BadCase: slices are missing, doubled or not evenly spaced, have no place in space, or cannot be decoded.
    """
    first = series.slices[0]
    where = f"{first.path.parent}, series {series.name}"
    for one in series.slices:
        missing = [
            tag for tag in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing") if tag not in one.header
        ]
        if missing:
            frames = int(one.header.get("NumberOfFrames") or 1)
            kind = f" (a file of {frames} frames; convert it to NIfTI first)" if frames > 1 else ""
            raise BadCase(f"{one.path}: has no {', '.join(missing)}{kind}; accepted are slices with a place in space")
        if int(one.header.get("SamplesPerPixel") or 1) != 1:
            raise BadCase(f"{one.path}: is a colour image; accepted is one sample a pixel")
    normal = np.cross(*first.axes)
    slices = sorted(series.slices, key=lambda one: float(one.position @ normal))
    step = _step(slices, normal, where)
    rows, columns = int(first.header.Rows), int(first.header.Columns)
    if (size := rows * columns * len(slices) * 4) > largest * GIB:
        raise BadCase(f"{where}: takes {size / GIB:.3g} GiB; accepted are {largest:g} (largest)")
    values = np.empty((columns, rows, len(slices)), np.float32)  # (X, Y, Z)
    for index, one in enumerate(slices):
        values[:, :, index] = _pixels(one).T
    # PixelSpacing is from row to row, then from column to column; a row runs along the first axis.
    between_rows, between_columns = (float(extent) for extent in first.header.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = first.axes[0] * between_columns
    affine[:3, 1] = first.axes[1] * between_rows
    affine[:3, 2] = step
    affine[:3, 3] = slices[0].position
    return values[None], TO_RAS @ affine


def _step(slices: list[Slice], normal: np.ndarray, where: str) -> np.ndarray:
    """From one slice to the next ``(3,)`` in mm."""
    if len(slices) < 2:
        raise BadCase(f"{where}: has 1 slice; accepted is a volume of 2 or more")
    along = np.array([float(one.position @ normal) for one in slices])
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    if (gaps < 1e-3).any():
        index = int(gaps.argmin())
        raise BadCase(
            f"{where}: {slices[index].path.name} and {slices[index + 1].path.name} lie at the same place, "
            f"{along[index]:.2f} mm; accepted is one slice at each"
        )
    if (np.abs(gaps - usual) > UNEVEN * usual).any():
        index = int(np.abs(gaps - usual).argmax())
        missing = round(gaps[index] / usual) - 1
        reason = f"{missing} missing" if missing > 0 else "unevenly spaced"
        raise BadCase(
            f"{where}: slices are {reason} between {along[index]:.2f} and {along[index + 1]:.2f} mm: "
            f"{gaps[index]:.3g} mm apart where the others are {usual:.3g} mm; accepted are evenly spaced slices"
        )
    step = (slices[-1].position - slices[0].position) / (len(slices) - 1)
    off = np.array([one.position - slices[0].position - index * step for index, one in enumerate(slices)])  # (n, 3)
    beside = np.linalg.norm(off - np.outer(off @ normal, normal), axis=1)  # (n,)
    if beside.max() > min(map(float, slices[0].header.PixelSpacing)):
        index = int(beside.argmax())
        raise BadCase(
            f"{where}: {slices[index].path.name} lies {beside[index]:.3g} mm beside the line of the other slices; "
            "accepted are slices above each other"
        )
    return step


def _pixels(one: Slice) -> np.ndarray:
    """Of a slice, with its own slope and intercept applied: ``(rows, columns)``."""
    try:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(one.path), sitk.sitkFloat32))[0]
    except RuntimeError as error:
        syntax = pydicom.dcmread(one.path, stop_before_pixels=True).file_meta.get("TransferSyntaxUID")
        kind = getattr(syntax, "name", None) or "an unknown transfer syntax"
        raise BadCase(f"{one.path}: cannot be decoded ({kind}): {str(error).strip().splitlines()[-1]}") from error
