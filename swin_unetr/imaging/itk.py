"""What SimpleITK reads and writes: NRRD, MetaImage."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ..foreign import reading
from . import headers
from .nifti import BadCase, check_grid, check_size, check_stored

TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""ITK's and DICOM's patient axes are left, posterior, superior."""


def read_itk(
    path: Path, largest: float = math.inf, say: Callable[[str], None] = lambda text: None
) -> tuple[np.ndarray, np.ndarray]:
    """Values ``(X, Y[, Z], C)`` of a file, and its affine ``(4, 4)``, voxel index to mm in RAS+.

    Args:
        largest: GiB that the file's values may take as float32.
        say: is called with what a reader of a result should know about how the file was understood.

    Raises:
        BadCase: the file is damaged, larger than `largest` by its header, not a grid of numbers, or not in mm.
    """
    with reading(path, BadCase):
        header = headers.read(path)
        headers.check_meaning(header, say)
        reader = sitk.ImageFileReader()
        # Chosen by the file's name, as for checking the header: SimpleITK would choose by content.
        reader.SetImageIO("NrrdImageIO" if header.nrrd else "MetaImageIO")
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        count = reader.GetNumberOfComponents() * math.prod(reader.GetSize())
        check_size(path, 4 * count, largest)
        check_stored(path, count, header.files)  # a byte each, or more
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())  # such as "vector of 16-bit signed integer"
        if "complex" not in kind:
            if (bits := re.search(r"(\d+)-bit", kind)) is None:
                raise ValueError(f"has voxels of type {kind}; accepted are real numbers")
            headers.check_data(header, count * int(bits[1]) // 8)
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
        RuntimeError: SimpleITK cannot write the file.
    """
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
    to_lps = TO_RAS @ affine
    spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((to_lps[:3, :3] / spacing).flatten().tolist())
    image.SetOrigin(to_lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=True)
