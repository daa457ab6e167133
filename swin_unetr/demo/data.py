"""The two CTs that ship with the package."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes

from ..files import replace

CLASSES = ("background", "body", "lung")
LABEL_NOTE = "Labels are derived by rule (see swin_unetr/data/README.md), not drawn by an expert."
AIR_HU = -400


@dataclass(frozen=True)
class Patient:
    """One scan on its own grid.

    Attributes:
        ct: HU, int16 ``(X, Y, Z)``.
        labels: index into `CLASSES`, uint8 ``(X, Y, Z)``.
        header: NIfTI header of the CT.
    """

    ct: np.ndarray
    labels: np.ndarray
    header: nibabel.Nifti1Header

    @property
    def affine(self) -> np.ndarray:
        """Voxel index to mm in RAS+, ``(4, 4)``."""
        return self.header.get_best_affine()

    @property
    def spacing(self) -> np.ndarray:
        """Voxel extents in mm."""
        return voxel_sizes(self.affine)

    def millilitres(self, labels: np.ndarray) -> dict[str, float]:
        """Volume of every class but the background in `labels` ``(X, Y, Z)``, by class name."""
        voxel = float(np.prod(self.spacing)) / 1000
        return {name: float((labels == index).sum() * voxel) for index, name in enumerate(CLASSES) if index > 0}


def load_patient(number: int) -> Patient:
    """Patient 1 or 2 of the package's data."""
    ct, labels = (_load(f"patient{number}_{kind}.nii.gz") for kind in ("ct", "labels"))
    return Patient(np.asarray(ct.dataobj, dtype=np.int16), np.asarray(labels.dataobj, dtype=np.uint8), ct.header.copy())


def _load(name: str) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image.from_bytes(gzip.decompress((folder() / name).read_bytes()))


def bare_threshold(patient: Patient) -> np.ndarray:
    """A segmentation without training: air is lung, the rest body; uint8 ``(X, Y, Z)``."""
    return np.where(patient.ct < AIR_HU, CLASSES.index("lung"), CLASSES.index("body")).astype(np.uint8)


def folder() -> Path:
    """The folder of the package's CTs."""
    return Path(str(resources.files("swin_unetr") / "data"))


def write_datalist(path: Path) -> Path:
    """Write a datalist of patient 2, with labels, whose entries are in `folder`; patient 1 stays unseen."""
    entry = {"image": "patient2_ct.nii.gz", "label": "patient2_labels.nii.gz"}
    replace({path: (json.dumps({"training": [entry]}, indent=2) + "\n").encode()})
    return path
