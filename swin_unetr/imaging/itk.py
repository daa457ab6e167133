"""What SimpleITK reads: NRRD, MetaImage, slices of DICOM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""ITK's and DICOM's patient axes are left, posterior, superior."""


def read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values ``(X, Y[, Z], C)`` of a file, and its affine ``(4, 4)``, voxel index to mm in RAS+.

    Raises:
        RuntimeError: the file is damaged or of another kind; SimpleITK's.
    """
    image = sitk.ReadImage(str(path))
    values = sitk.GetArrayFromImage(image)  # ([Z, ]Y, X[, C])
    if image.GetNumberOfComponentsPerPixel() == 1:
        values = values[..., None]  # ([Z, ]Y, X, C)
    dimension = image.GetDimension()
    return values.transpose(*reversed(range(dimension)), dimension), affine_of(image)


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
