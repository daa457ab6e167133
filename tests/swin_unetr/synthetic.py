"""Small synthetic volumes on disk, with a datalist: cases with any number of modalities, spacing and label values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np


def volume(
    seed: int, shape: Sequence[int], channels: int, values: Sequence[int], kind: Literal["ct", "mr"]
) -> tuple[np.ndarray, np.ndarray]:
    """A body with an organ in it for each of `values`: image ``(X, Y, Z, C)`` and label ``(X, Y, Z)``.

    In "ct" air is at -1000 and organs lie around 0; in "mr" the outside is 0.
    """
    random = np.random.default_rng(seed)
    outside, body = (-1000, 0) if kind == "ct" else (0, 300)
    image = np.full((*shape, channels), outside, np.int16)
    inner = tuple(slice(extent // 8, extent - extent // 8) for extent in shape)
    label = np.zeros(shape, np.uint8)
    image[inner] = body + random.integers(-50, 50, image[inner].shape)
    for value in values:
        size = [max(2, extent // 6) for extent in shape]
        low = [random.integers(part.start, part.stop - length) for part, length in zip(inner, size, strict=True)]
        organ = tuple(slice(start, start + length) for start, length in zip(low, size, strict=True))
        label[organ] = value
        image[organ] += 10 * value
    return image, label


def write(path: Path, values: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, np.diag([*spacing, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def dataset(
    folder: Path,
    cases: int = 4,
    shape: Sequence[int] = (40, 36, 34),
    channels: int = 1,
    values: Sequence[int] = (1,),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    kind: Literal["ct", "mr"] = "ct",
    split_files: bool = False,
) -> Path:
    """Write cases as the Medical Segmentation Decathlon does; returns the path of the dataset.json.

    Args:
        split_files: one file per channel, in one folder per case, as in BraTS; otherwise all channels in one file.
    """
    entries = []
    for number in range(cases):
        image, label = volume(number, shape, channels, values, kind)
        name = f"case_{number:02d}"
        if split_files:
            files = [f"imagesTr/{name}/{name}_{channel}.nii.gz" for channel in range(channels)]
            for channel, file in enumerate(files):
                write(folder / file, image[..., channel], spacing)
        else:
            files = f"./imagesTr/{name}.nii.gz"
            write(folder / files, image[..., 0] if channels == 1 else image, spacing)
        write(folder / f"labelsTr/{name}.nii.gz", label, spacing)
        entries.append({"image": files, "label": f"./labelsTr/{name}.nii.gz"})
    content = {
        "name": "synthetic",
        "modality": {str(channel): kind for channel in range(channels)},
        "labels": {"0": "background", **{str(value): f"organ {value}" for value in values}},
        "numTraining": cases,
        "training": entries,
        "numTest": 1,
        "test": ["./imagesTs/case_99.nii.gz"],
    }
    path = folder / "dataset.json"
    path.write_text(json.dumps(content))
    return path
