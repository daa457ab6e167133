"""A small trained-looking checkpoint, and images to segment with it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import nibabel
import numpy as np
import torch

from swin_unetr import checkpoints
from swin_unetr.architecture import Architecture
from swin_unetr.labels import Labels
from swin_unetr.preprocessing import Preprocessing

ROI = (32, 64, 32)
SMALL = {"feature_size": 12, "depths": (1, 1, 1, 1), "out_channels": 3}
ORGANS = Labels({"liver": [1], "spleen": [7]})


def checkpoint(path: Path, seed: int = 0, labels: Labels = ORGANS, kind: str = "train", **options) -> Path:
    """Write a checkpoint of random weights, the same for each seed."""
    preprocessing = Preprocessing(**{"spacing": (2.0, 2.0, 3.0), "window": (-100.0, 100.0)} | options)
    architecture = Architecture(**SMALL)
    torch.manual_seed(seed)
    content = {
        "kind": kind,
        "architecture": asdict(architecture),
        "roi": list(ROI),
        "preprocessing": asdict(preprocessing),
        "labels": {"classes": {k: list(v) for k, v in labels.classes.items()}, "overlapping": labels.overlapping},
        "model": architecture.build().state_dict(),
        "ema": None,
    }
    checkpoints.write(path, content)
    return path


def affine(axes: str = "RAS", spacing=(1.6, 1.9, 4.0)) -> np.ndarray:
    """The affine of a grid whose axes run to the sides named, somewhere in space."""
    place = np.zeros((4, 4))
    for axis, side in enumerate(axes):
        patient = next(i for i, pair in enumerate(("RL", "AP", "SI")) if side in pair)
        place[patient, axis] = spacing[axis] * (1 if side in "RAS" else -1)
    place[:3, 3] = (-40.0, 25.0, 300.0)
    place[3, 3] = 1
    return place


def image(shape=(40, 61, 23), seed: int = 0) -> np.ndarray:
    """Smooth noise in HU, int16."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 1, *[max(2, extent // 8) for extent in shape], generator=random)
    smooth = torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0, 0]
    return (100 * smooth).round().to(torch.int16).numpy()


def nifti(path: Path, values: np.ndarray | None = None, place: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(image() if values is None else values, affine() if place is None else place), path)
    return path
