"""What SimpleITK reads and writes: NRRD, MetaImage."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path, PurePath

import numpy as np
import SimpleITK as sitk

from ..foreign import irregular, listed, reading
from ..names import shown
from .nifti import GIB, BadCase

LONGEST_HEADER = 2**24  # bytes
NRRD_DATA = re.compile(r"\s*data\s*file\s*:(?!=)(.*)", re.IGNORECASE)
META_DATA = re.compile(r"\s*ElementDataFile\s*[=:](.*)")
NUMBER = re.compile(r"%[0-9]*[diu]")
NUMBERED = re.compile(rf"[^%]*{NUMBER.pattern}[^%/]*")
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""ITK's and DICOM's patient axes are left, posterior, superior."""


def read_itk(path: Path, largest: float = math.inf) -> tuple[np.ndarray, np.ndarray]:
    """Values ``(X, Y[, Z], C)`` of a file, and its affine ``(4, 4)``, voxel index to mm in RAS+.

    Args:
        largest: GiB that the file's values may take as float32.

    Raises:
        BadCase: the file is damaged, larger than `largest` by its header, or no grid of numbers.
    """
    with reading(path, BadCase):
        check_data_files(path)
        reader = sitk.ImageFileReader()
        # By the file's name, as the header was checked: SimpleITK would go by what is in it.
        reader.SetImageIO("NrrdImageIO" if path.name.endswith(".nrrd") else "MetaImageIO")
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        size = 4 * reader.GetNumberOfComponents() * math.prod(reader.GetSize())
        if size > largest * GIB:
            raise BadCase(f"{path}: takes {size / GIB:.3g} GiB by its header; accepted are {largest:g} (largest)")
        image = reader.Execute()
        values = sitk.GetArrayFromImage(image)  # ([Z, ]Y, X[, C])
    if values.dtype.kind not in "iuf":
        raise BadCase(f"{path}: has voxels of type {values.dtype}; accepted are real numbers")
    if image.GetNumberOfComponentsPerPixel() == 1:
        values = values[..., None]  # ([Z, ]Y, X, C)
    dimension = image.GetDimension()
    return values.transpose(*reversed(range(dimension)), dimension), affine_of(image)


def check_data_files(path: Path) -> None:
    """Raise `BadCase` if the header in `path` names data elsewhere than in regular files of its own folder.

    Parsers would read any file of the machine as an image, and its bytes would be shown as grey values.
    """
    for name in _data_files(path):
        said = f"{path}: its header names {shown(name)!r} as its data"
        if "%" in name:
            name = name.split()[0]
            if not NUMBERED.fullmatch(name):
                raise BadCase(f"{said}; accepted are names with one number, such as slice%03d.raw")
        place = PurePath(name)
        if place.is_absolute() or ".." in place.parts or "\\" in name:
            raise BadCase(f"{said}; accepted are files in its own folder")
        file = path.parent / place
        fits = re.compile(NUMBER.sub("-?[0-9]+", re.escape(file.name).replace("\\%", "%")))
        files = [other for other in listed(file.parent) if fits.fullmatch(other.name)] if "%" in name else [file]
        for file in files:
            if (why := irregular(file)) is not None:
                raise BadCase(f"{said}, which cannot be read: {why}")


def _data_files(path: Path) -> list[str]:
    """Names, and patterns of numbered names, of the data of the header in `path`; none if they follow in the file."""
    nrrd = path.name.endswith(".nrrd")
    field = NRRD_DATA if nrrd else META_DATA
    names: list[str] = []
    with path.open("rb") as file:
        while line := file.readline(LONGEST_HEADER):
            if file.tell() >= LONGEST_HEADER:
                raise BadCase(f"{path}: has a header of more than {LONGEST_HEADER} bytes")
            if nrrd and not line.strip():
                break  # what follows are data
            # Either sign ends a line of NRRD.
            for text in re.split(r"[\r\n]", os.fsdecode(line)):
                if (match := field.match(text)) is None:
                    continue
                name = match[1].strip()
                if not nrrd and name.upper() == "LOCAL":
                    return names  # what follows are data
                if name.startswith("LIST"):
                    rest = re.split(r"[\r\n]", os.fsdecode(file.read(LONGEST_HEADER)))
                    return names + [name.strip() for name in rest if name.strip()]
                names.append(name)
    return names


def affine_of(image: sitk.Image) -> np.ndarray:
    """Voxel index to mm in RAS+ ``(4, 4)``."""
    dimension = image.GetDimension()
    affine = np.eye(4)
    directions = np.array(image.GetDirection()).reshape(dimension, dimension)
    affine[:dimension, :dimension] = directions * image.GetSpacing()
    affine[:dimension, 3] = image.GetOrigin()
    return TO_RAS @ affine


def write_itk(values: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write ``values (X, Y, Z)``, compressed, in the geometry of `affine`.

    Raises:
        RuntimeError: the file cannot be written; SimpleITK's.
    """
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
    to_lps = TO_RAS @ affine
    spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((to_lps[:3, :3] / spacing).flatten().tolist())
    image.SetOrigin(to_lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=True)
