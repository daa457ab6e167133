"""`predict` from file to file, against the same work by MONAI's model, transforms, sliding window and inverse."""

from __future__ import annotations

import copy
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from goals import IMAGE_EXTENT
from monai import transforms
from monai.inferers import sliding_window_inference
from monai.networks.nets import SwinUNETR
from peers import CLASSES, Gate
from rich.console import Console

from swin_unetr import checkpoints, predict
from swin_unetr.architecture import Architecture
from swin_unetr.prediction.windows import Windows
from swin_unetr.preprocessing import Preprocessing

FEATURE_SIZE = 24
OVERLAP = 0.25
BATCH = 4
CT = (512, 512, 61)
"""Voxels at `IMAGE_EXTENT`; for another extent of the window, scaled by the same factor on each axis."""

DIFFERING_VOXELS_LIMIT = 1e-4
"""Share of the voxels whose label may differ: interpolated probabilities of two classes can tie."""


def ct(extent: int, path: Path) -> tuple[int, ...]:
    """Write patient 2 of the package's data with more voxels; returns how many there are on each axis."""
    with resources.as_file(resources.files("swin_unetr") / "data" / "patient2_ct.nii.gz") as file:
        patient = nibabel.Nifti1Image.from_filename(file)
        hu = torch.from_numpy(patient.get_fdata(dtype=np.float32))
    shape = tuple(n * extent // IMAGE_EXTENT for n in CT)
    kept = [min(have, have * extent // IMAGE_EXTENT) for have in hu.shape]
    start = [(have - n) // 2 for have, n in zip(hu.shape, kept, strict=True)]
    hu = hu[tuple(slice(a, a + n) for a, n in zip(start, kept, strict=True))]
    voxels = F.interpolate(hu[None, None], shape, mode="trilinear")[0, 0].round().short().numpy()
    affine = patient.affine @ np.diag([*(n / m for n, m in zip(kept, shape, strict=True)), 1.0])
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return shape


def checkpoint(extent: int, path: Path) -> SwinUNETR:
    """Write a checkpoint of fixed random weights; returns MONAI's model with them."""
    torch.manual_seed(0)
    architecture = Architecture(in_channels=1, out_channels=CLASSES, feature_size=FEATURE_SIZE)
    weights = architecture.build().state_dict()
    content = {
        "kind": "train",
        "architecture": asdict(architecture),
        "roi": [extent] * 3,
        "preprocessing": asdict(Preprocessing()),
        "labels": {"classes": {f"organ {value}": [value] for value in range(1, CLASSES)}, "overlapping": False},
        "model": weights,
        "ema": None,
    }
    checkpoints.write(path, content)
    model = SwinUNETR(in_channels=1, out_channels=CLASSES, feature_size=FEATURE_SIZE)
    model.load_state_dict(copy.deepcopy(weights))
    return model.eval()


class Monai:
    """What a user of MONAI runs: dictionary transforms, sliding window, their inverse, argmax, a NIfTI file."""

    def __init__(self, model: SwinUNETR, image: Path, out: Path, roi: int) -> None:
        self.model, self.image, self.roi = model, image, roi
        self.label = out / image.name
        prepared = Preprocessing()
        assert prepared.spacing is not None
        self.before = transforms.Compose(
            [
                transforms.LoadImaged("image"),
                transforms.EnsureChannelFirstd("image"),
                transforms.Orientationd("image", axcodes=prepared.orientation, labels=None),
                transforms.Spacingd("image", pixdim=prepared.spacing, mode="bilinear"),
                transforms.ScaleIntensityRanged("image", *prepared.window, 0.0, 1.0, clip=True),
            ]
        )
        self.after = transforms.Compose(
            [
                transforms.Activationsd("pred", softmax=True),
                transforms.Invertd("pred", self.before, "image", nearest_interp=False, to_tensor=True),
                transforms.AsDiscreted("pred", argmax=True),
                transforms.SaveImaged(
                    "pred",
                    output_dir=out,
                    output_postfix="",
                    separate_folder=False,
                    resample=False,
                    output_dtype=np.uint8,
                    print_log=False,
                ),
            ]
        )

    @torch.inference_mode()
    def __call__(self) -> None:
        item = self.before({"image": self.image})
        logits = sliding_window_inference(
            item["image"][None], (self.roi,) * 3, BATCH, self.model, OVERLAP, mode="gaussian"
        )
        self.after({**item, "pred": logits[0]})


def labels(path: Path) -> np.ndarray:
    return np.asarray(nibabel.Nifti1Image.from_filename(path).dataobj)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_predict(versus, extent, tmp_path):
    shape = ct(extent, tmp_path / "ct.nii.gz")
    theirs = Monai(checkpoint(extent, tmp_path / "best.pt"), tmp_path / "ct.nii.gz", tmp_path / "monai", extent)
    options = predict.PredictOptions(
        [tmp_path / "best.pt"],
        [tmp_path / "ct.nii.gz"],
        tmp_path / "ours",
        windows=Windows(overlap=OVERLAP, batch=BATCH),
        overwrite=True,
        device="cpu",
    )

    def ours() -> None:
        assert predict.run(options, Console(quiet=True)) == 0

    ours()
    theirs()
    found, expected = labels(tmp_path / "ours" / "ct.nii.gz"), labels(theirs.label)
    common = np.bincount(expected.ravel(), minlength=CLASSES) > 1e-3 * expected.size
    assert common.sum() >= 4, "a label map of fewer classes shows little"
    versus(
        "predict, from file to file",
        {"MONAI": theirs, "ours": ours},
        gate=Gate("part of the voxels that differ", float((found != expected).mean()), DIFFERING_VOXELS_LIMIT),
        sizes=f"{'×'.join(map(str, shape))} CT, f{FEATURE_SIZE}, 1→{CLASSES}, window {extent}³, overlap {OVERLAP:g}",
        dtype=torch.float32,
        rounds=5,
    )
