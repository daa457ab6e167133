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
from .nifti import BadCase, check_grid, check_size, check_stored

LONGEST_PATH = 800  # bytes, of NRRD's; messages of its parser have room for a few more
LONGEST_HEADER = 2**24  # bytes
LONGEST_FIELD = 1000  # letters; values that users add to NRRD (key:=value) may be longer
META_AXES = re.compile(r"\s*NDims\s*[=:](.*)")
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
        files = check_header(path)
        reader = sitk.ImageFileReader()
        # By the file's name, as the header was checked: SimpleITK would go by what is in it.
        reader.SetImageIO("NrrdImageIO" if path.name.endswith(".nrrd") else "MetaImageIO")
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        count = reader.GetNumberOfComponents() * math.prod(reader.GetSize())
        check_size(path, 4 * count, largest)
        check_stored(path, count, files)  # a byte each, or more
        image = reader.Execute()
        values = sitk.GetArrayFromImage(image)  # ([Z, ]Y, X[, C])
    if values.dtype.kind not in "iuf":
        raise BadCase(f"{path}: has voxels of type {values.dtype}; accepted are real numbers")
    if image.GetNumberOfComponentsPerPixel() == 1:
        values = values[..., None]  # ([Z, ]Y, X, C)
    dimension = image.GetDimension()
    affine = affine_of(image)
    check_grid(path, image.GetSize(), affine)
    return values.transpose(*reversed(range(dimension)), dimension), affine


def check_header(path: Path) -> list[Path]:
    """The files with the data of the image whose header is in `path`.

    Raises:
        BadCase: the header would end the process, or show files that are not the image's own.

    Parsers write what is too long for them over their own memory, and would read any file of the machine as an image,
    whose bytes were then shown as grey values.
    """
    if path.name.endswith(".nrrd") and (length := len(os.fsencode(path))) > LONGEST_PATH:
        raise BadCase(f"{path}: has a path of {length} bytes; accepted are {LONGEST_PATH} for NRRD")
    fields, listed_names = _fields(path)
    for text in fields:
        if len(text) > LONGEST_FIELD and ":=" not in text[:LONGEST_FIELD] and not text.startswith("#"):
            raise BadCase(f"{path}: has a field of {len(text)} letters in its header; accepted are {LONGEST_FIELD}")
        if (match := META_AXES.match(text)) and match[1].strip() not in ("1", "2", "3", "4"):
            raise BadCase(f"{path}: has NDims = {shown(match[1].strip())}; accepted are 1 to 4 axes")
    data = NRRD_DATA if path.name.endswith(".nrrd") else META_DATA
    named = [match[1].strip() for text in fields if (match := data.match(text))]
    files = []
    for name in [*named, *listed_names]:
        if not (name.startswith("LIST") or (data is META_DATA and name.upper() == "LOCAL")):
            files += _data_files(path, name)
    return files or [path]


def _data_files(path: Path, name: str) -> list[Path]:
    """The files that the header in `path` names `name` for its data.

    Raises:
        BadCase: one is no regular file in the folder of `path`.
    """
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
    return files


def _fields(path: Path) -> tuple[list[str], list[str]]:
    """Lines of the header in `path`, and the names in a list of data files after them."""
    nrrd = path.name.endswith(".nrrd")
    data = NRRD_DATA if nrrd else META_DATA
    fields: list[str] = []
    with path.open("rb") as file:
        while line := file.readline(LONGEST_HEADER):
            if file.tell() >= LONGEST_HEADER:
                raise BadCase(f"{path}: has a header of more than {LONGEST_HEADER} bytes")
            if nrrd and not line.strip():
                break  # data follow
            # Either sign ends a line of NRRD.
            fields += re.split(r"[\r\n]", os.fsdecode(line).rstrip("\r\n"))
            if (match := data.match(fields[-1])) is None:
                continue
            name = match[1].strip()
            if name.startswith("LIST"):
                rest = re.split(r"[\r\n]", os.fsdecode(file.read(LONGEST_HEADER)))
                return fields, [name.strip() for name in rest if name.strip()]
            if not nrrd and name.upper() == "LOCAL":
                break  # data follow
    return fields, []


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
