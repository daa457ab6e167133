"""Images to segment, whatever file they come from, and label maps written in the geometry of the image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes

from ..foreign import listed
from ..names import some
from . import dicom
from .itk import read_itk, write_itk
from .nifti import BadCase, as_float32, check_grid, read_with_header
from .suffixes import IMAGES, NIFTI, case_name, suffix

DATA = (".raw", ".zraw")
"""Suffixes of files that hold the values of a MetaImage."""


@dataclass(frozen=True)
class Volume:
    """An image and where it lies.

    Attributes:
        values: float32 ``(C, X, Y, Z)``.
        affine: voxel index to mm in RAS+ ``(4, 4)``.
        header: of the NIfTI file it came from, else None.
        notes: what a reader of a result should know of how its file was understood.
    """

    values: np.ndarray
    affine: np.ndarray
    header: nibabel.Nifti1Header | None = None
    notes: tuple[str, ...] = ()

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel extents in mm."""
        return tuple(float(extent) for extent in voxel_sizes(self.affine))


@dataclass(frozen=True)
class Source:
    """An image that can be read.

    Attributes:
        name: of the case: the file's without suffix, or what a DICOM series says of itself, after its folders where
            several say the same.
        path: file, or folder of the series' slices.
        read: reads it; raises `BadCase`, which names the file.
        notes: what a reader of a result should know of how it was found.
    """

    name: str
    path: Path
    read: Callable[[], Volume]
    notes: tuple[str, ...] = ()


def find(
    paths: Sequence[Path],
    largest: float,
    skip: Callable[[Path, str], None] = lambda path, why: None,
    identify: str | None = None,
) -> list[Source]:
    """The images that `paths` name: a file; a folder of volumes; a folder of DICOM files, each series by itself.

    Args:
        largest: GiB that one image may take uncompressed.
        skip: is told of every file in the folders that is left out, and why.
        identify: what the names of DICOM series begin with: accession (number), patient (ID), or nothing of a patient.

    Raises:
        ValueError: a path is missing, of an unknown kind or holds no image, or two images have one name.
    """
    sources: list[Source] = []
    series: list[dicom.Series] = []
    left_out: list[tuple[Path, str]] = []

    def leave_out(path: Path, why: str) -> None:
        left_out.append((path, why))
        skip(path, why)

    for path in map(Path, paths):
        if not os.path.exists(path):
            raise ValueError(f"input: {path} does not exist")
        if not os.path.isdir(path):
            sources.append(_file(path, largest))
        elif volumes := _volumes(path, leave_out):
            sources += [_file(volume, largest) for volume in volumes]
        elif found := dicom.find(path, leave_out, identify):
            series += found
        else:
            others = [f"{file.name} ({why})" for file, why in left_out if file.is_relative_to(path)]
            raise ValueError(
                f"input: {path} holds neither DICOM files nor files that end in {', '.join(IMAGES)}"
                + (f": {some(others)}" if others else "")
            )
    for one, name in zip(series, dicom.names(series), strict=True):
        sources.append(Source(name, one.folder, partial(_read_series, one, largest), one.notes))
    by_name: dict[str, Source] = {}
    for source in sources:
        other = by_name.setdefault(source.name, source)
        if other is not source:
            raise ValueError(
                f"input: {other.path} and {source.path} are both case {source.name!r}; accepted is a name each"
            )
    return sources


def _volumes(folder: Path, skip: Callable[[Path, str], None]) -> list[Path]:
    """The images in `folder` itself, if it has any; what else is in it is left out."""
    entries = [path for path in listed(folder) if not path.name.startswith(".")]
    volumes = [path for path in entries if path.name.endswith(IMAGES)]
    for path in entries if volumes else ():
        if not path.name.endswith((*IMAGES, *DATA)):
            skip(path, "is a folder" if os.path.isdir(path) else f"ends in none of {', '.join(IMAGES)}")
    return volumes


def _file(path: Path, largest: float) -> Source:
    if not suffix(path):
        raise ValueError(f"input: {path} ends in none of {', '.join(IMAGES)}; of DICOM, name the folder")
    return Source(case_name(path, IMAGES), path, lambda: read(path, largest))


def _read_series(series: dicom.Series, largest: float) -> Volume:
    values, affine = dicom.read(series, largest)
    check_grid(series.folder, values.shape, affine)
    return Volume(as_float32(values, series.folder), affine)


def read(path: Path, largest: float) -> Volume:
    """The volume in a file.

    Raises:
        BadCase: the file is damaged, too large, has NaN or infinite voxels, or is not a volume; the message names it.
    """
    header, notes = None, list[str]()
    if path.name.endswith(NIFTI):
        values, affine, header = read_with_header(path, largest)
        values = values[..., None] if values.ndim == 3 else values  # (X, Y, Z, C)
    else:
        values, affine = read_itk(path, largest, notes.append)
        if values.ndim != 4:
            raise BadCase(f"{path}: has {values.ndim - 1} axes; accepted are three")
    values = as_float32(values, path)
    return Volume(np.ascontiguousarray(np.moveaxis(values, -1, 0)), affine, header, tuple(notes))  # (C, X, Y, Z)


def output_suffix(source: Source) -> str:
    """Of a label map for `source`: its own, and NIfTI for DICOM."""
    return NIFTI[0] if os.path.isdir(source.path) else suffix(source.path) or NIFTI[0]


def write(values: np.ndarray, volume: Volume, path: Path) -> None:
    """Write ``values (X, Y, Z)`` in the geometry of `volume`, replacing what is there once the new file is whole.

    Raises:
        OSError: the file cannot be written.
    """
    kind = suffix(path)
    # A name of its own length: one made of `path` could be longer than the system allows.
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    temporary = path.with_name(f".{digest}.part{'.mha' if kind == '.mhd' else kind}")
    try:
        if kind in NIFTI:
            header = _in_millimetres() if volume.header is None else volume.header.copy()
            header.set_data_dtype(values.dtype)
            header.set_slope_inter(1, 0)
            header["cal_min"] = header["cal_max"] = 0  # how to show the image, not its labels
            image = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
            affine = volume.affine if volume.header is None else None  # a header that has one keeps both of its forms
            nibabel.save(image(values, affine, header), temporary)
        else:
            write_itk(values, volume.affine, temporary)
        os.replace(temporary, path)
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written: {str(error).strip().splitlines()[-1]}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _in_millimetres() -> nibabel.Nifti1Header:
    header = nibabel.Nifti1Header()
    header.set_xyzt_units("mm")
    return header
