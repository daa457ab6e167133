"""NIfTI files, read no further than their headers promise."""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

from ..files import GIB
from ..foreign import BadFile, reading

FLATTEST = 1e-4
"""Smallest volume spanned by the axes of a voxel, normalised to length 1."""
GZIP = b"\x1f\x8b"
LONGEST_HEADER = 540  # bytes, of NIfTI-2
MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""mm per unit, by NIfTI's codes of spatial units: unknown, metre, mm, micron. Most files of unknown unit are in mm."""
MOST_COMPRESSED = 1032
"""Most bytes that deflate, which gzip uses, expands one byte to: 258 for two bits (RFC 1951)."""


class BadCase(BadFile):
    """A case cannot be used; the message names its file."""


def read_nifti(path: Path, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Values ``(X, Y, Z)`` or ``(X, Y, Z, C)`` of a file, and its affine ``(4, 4)``, voxel index to mm in RAS+.

    Like `read_with_header`, without the header.
    """
    return read_with_header(path, largest)[:2]


def read_with_header(path: Path, largest: float) -> tuple[np.ndarray, np.ndarray, nibabel.Nifti1Header]:
    """Values ``(X, Y, Z)`` or ``(X, Y, Z, C)`` of a file, its affine ``(4, 4)``, voxel index to mm in RAS+, its header.

    Raises:
        BadCase: as `read_any`, or the file has other axes.
    """
    values, affine, header = read_any(path, largest)
    if values.ndim not in (3, 4):
        raise BadCase(f"{path}: has shape {values.shape}; accepted are three axes, or four with channels last")
    return values, affine, header


def read_any(path: Path, largest: float = math.inf) -> tuple[np.ndarray, np.ndarray, nibabel.Nifti1Header]:
    """Values with any number of axes, except trailing ones of one voxel, affine ``(4, 4)`` and header of a file.

    What is read is what the header implies: a compressed stream is not followed beyond that.

    Args:
        largest: GiB that the file may take uncompressed.

    Raises:
        BadCase: the file is damaged, larger than `largest` or than its header implies, or not a grid of numbers in
            space.

    The affine is in mm whatever unit the file is in; its header keeps that.
    """
    with reading(path, BadCase), _opened(path) as stream:
        kind, header, size = _implied(stream)
        check_size(path, size, largest)
        check_stored(path, size, [path])
        unit = _unit(path, header)
        image = kind.from_stream(stream)
        affine = np.diag([unit, unit, unit, 1.0]) @ image.affine
        values = np.asanyarray(image.dataobj)
        stream.seek(size)
        if stream.read(1):
            raise BadCase(f"{path}: is larger than its header says: it goes on after {size} bytes")
    if values.dtype.kind not in "iufb":
        raise BadCase(f"{path}: has voxels of type {values.dtype}; accepted are real numbers")
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]  # (X, Y, Z, 1) -> (X, Y, Z)
    check_grid(path, values.shape, affine)
    return values, affine, image.header


def _opened(path: Path) -> io.BufferedIOBase:
    """The content of a file, decompressed if it begins like gzip: the target of a link may have any name."""
    with path.open("rb") as file:
        compressed = file.read(len(GZIP)) == GZIP
    return gzip.open(path) if compressed else path.open("rb")


def _implied(stream: io.BufferedIOBase) -> tuple[type[nibabel.Nifti1Image], nibabel.Nifti1Header, int]:
    """Which kind of NIfTI begins in `stream`, its header as it is written, and how many bytes that implies; leaves
    `stream` at its start."""
    head = stream.read(LONGEST_HEADER)
    stream.seek(0)
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        if kind.header_class.may_contain_header(head):
            written = head[: kind.header_class.template_dtype.itemsize]
            header = kind.header_class(written)
            voxels = math.prod(map(int, header.get_data_shape()))
            size = int(header.get_data_offset()) + voxels * header.get_data_dtype().itemsize
            return kind, kind.header_class(written, check=False), size
    raise ValueError("is not a NIfTI file")


def _unit(path: Path, header: nibabel.Nifti1Header) -> float:
    """mm per unit of space in a file.

    Raises:
        BadCase: NIfTI has no such unit, or the header has neither an affine nor voxel extents, for which nibabel would
            assume 1.
    """
    code = int(header["xyzt_units"]) & 7
    if code not in MILLIMETRES:
        raise BadCase(
            f"{path}: its header has unit {code} of space; accepted are 1 (metre), 2 (mm), 3 (micron) and 0 (unknown)"
        )
    axes = min(3, int(header["dim"][0]))
    extents, voxels = header["pixdim"][1 : axes + 1], header["dim"][1 : axes + 1]
    if not header["sform_code"] > 0 and ((extents == 0) & (voxels > 1)).any():
        shown = " × ".join(f"{extent:g}" for extent in extents)
        raise BadCase(f"{path}: its header has voxels of {shown}, and no affine; accepted are extents above 0")
    return MILLIMETRES[code]


def check_size(path: Path, size: int, largest: float) -> None:
    """Raise `BadCase` if what is in `path` takes `size` bytes, and that is more than `largest` GiB."""
    if size > largest * GIB:
        raise BadCase(f"{path}: takes {size / GIB:.3g} GiB by its header; accepted are {largest:g} (largest)")


def check_stored(path: Path, size: int, files: Sequence[Path]) -> None:
    """Raise `BadCase` if the header in `path` implies `size` bytes, and its `files` cannot hold that, compressed.

    Readers allocate the memory first, and notice afterwards.
    """
    stored = sum(file.stat().st_size for file in files)
    if size > stored * MOST_COMPRESSED:
        raise BadCase(
            f"{path}: takes {size} bytes by its header, which {stored} bytes on disk cannot hold: the file is damaged"
        )


def check_grid(where: object, shape: Sequence[int], affine: np.ndarray) -> None:
    """Raise `BadCase` unless there is a voxel or more, and ``affine (4, 4)`` puts them somewhere in space."""
    if not math.prod(shape):
        raise BadCase(f"{where}: has shape {tuple(shape)}; accepted is one voxel or more")
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        place = affine.astype(np.float32).astype(np.float64)  # as files keep it
        volume = abs(np.linalg.det(place[:3, :3] / np.linalg.norm(place[:3, :3], axis=0)))  # of axes of length 1
    # "not above" rather than "below", so that values that are not finite are refused, too.
    if not (np.isfinite(place).all() and volume > FLATTEST):
        raise BadCase(f"{where}: has an affine that cannot be inverted; accepted is a voxel grid in space")


def as_float32(values: np.ndarray, where: object) -> np.ndarray:
    """`values` as float32.

    Raises:
        BadCase: a value is NaN or infinite then; the message names `where` it came from.
    """
    with np.errstate(over="ignore"):
        cast = values.astype(np.float32, copy=False)
    bad = int(np.count_nonzero(~np.isfinite(cast)))
    if bad:
        beyond = bad - int(np.count_nonzero(~np.isfinite(values)))
        of_them = f", {beyond} of them beyond the range of float32" if beyond else ""
        raise BadCase(f"{where}: {bad} voxels are NaN or infinite{of_them}; accepted are finite intensities")
    return cast
