"""The two CTs that ship with the package, and the random views of one that training sees."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import nibabel
import numpy as np
import torch
from monai import transforms
from monai.data import Dataset
from nibabel.affines import voxel_sizes

CLASSES = ("background", "body", "lung")
LABEL_NOTE = "Labels are derived by rule (see swin_unetr/data/README.md), not drawn by an expert."
HU_RANGE = (-1000.0, 400.0)  # air to bone, mapped to 0..1
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

    def image(self) -> torch.Tensor:
        """The CT as the model sees it: float32 ``(1, X, Y, Z)`` in 0..1."""
        low, high = HU_RANGE
        scale = transforms.ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)
        return torch.as_tensor(scale(torch.from_numpy(self.ct[None]).float()))

    def millilitres(self, labels: np.ndarray) -> dict[str, float]:
        """Volume of every class but the background in `labels` ``(X, Y, Z)``, by class name."""
        voxel = float(np.prod(self.spacing)) / 1000
        return {name: float((labels == index).sum() * voxel) for index, name in enumerate(CLASSES) if index > 0}


def load_patient(number: int) -> Patient:
    """Patient 1 or 2 of the package's data."""
    ct, labels = (_load(f"patient{number}_{kind}.nii.gz") for kind in ("ct", "labels"))
    return Patient(np.asarray(ct.dataobj, dtype=np.int16), np.asarray(labels.dataobj, dtype=np.uint8), ct.header.copy())


def _load(name: str) -> nibabel.Nifti1Image:
    packed = (resources.files("swin_unetr") / "data" / name).read_bytes()
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(packed))


def bare_threshold(patient: Patient) -> np.ndarray:
    """What needs no training: lung is air, body the rest; uint8 ``(X, Y, Z)``."""
    return np.where(patient.ct < AIR_HU, CLASSES.index("lung"), CLASSES.index("body")).astype(np.uint8)


def random_views(patient: Patient, window: Sequence[int], count: int, seed: int) -> Dataset:
    """`count` random views of `patient`, each ``{"image": (1, *window), "label": (1, *window)}``.

    A view is a window at a random place, rotated, scaled, flipped on each axis with probability 1/2, with
    a little noise. The flips matter: the two patients do not lie on the same side. Windows may reach beyond
    the scan, because those of a prediction lie at its edges. Intensities hardly change: HU are absolute,
    and little else tells lung from the air outside.
    """
    keys = ("image", "label")
    room = [1.3 * (extent - size) / 2 for extent, size in zip(patient.ct.shape, window, strict=True)]
    view = transforms.Compose(
        [
            transforms.RandAffined(
                keys,
                prob=1.0,
                spatial_size=tuple(window),
                translate_range=[(-r, r) if r > 0 else (0, 0) for r in room],
                rotate_range=(0.1, 0.1, 0.3),
                scale_range=(0.15, 0.15, 0.15),
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            *[transforms.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)],
            transforms.RandScaleIntensityd("image", factors=0.05, prob=0.5),
            transforms.RandShiftIntensityd("image", offsets=0.01, prob=0.5),
            transforms.RandGaussianNoised("image", std=0.01, prob=0.5),
            transforms.ToTensord(keys, track_meta=False),
        ]
    ).set_random_state(seed)
    volume = {"image": patient.image(), "label": torch.as_tensor(patient.labels[None], dtype=torch.float32)}
    return Dataset([volume] * count, view)
