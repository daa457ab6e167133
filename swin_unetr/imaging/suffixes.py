"""Suffixes of image files, and the case names that remain without them."""

from __future__ import annotations

from pathlib import Path

NIFTI = (".nii.gz", ".nii")
IMAGES = (*NIFTI, ".nrrd", ".mha", ".mhd")
LABEL_MAPS = (*IMAGES, ".seg.nrrd")
"""The last is that of 3D Slicer's segmentations."""


def suffix(path: Path, known: tuple[str, ...] = IMAGES) -> str:
    """The longest of the suffixes `known` that the name of `path` has; "" if it has none."""
    return max((one for one in known if path.name.endswith(one)), key=len, default="")


def case_name(path: Path, known: tuple[str, ...] = LABEL_MAPS) -> str:
    """The name of `path` without its suffix, of two parts where it has one."""
    return path.name.removesuffix(suffix(path, known))
