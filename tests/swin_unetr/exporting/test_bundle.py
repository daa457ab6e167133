"""The MONAI bundle: its label maps against `predict`, what MONAI and MONAI Label read from it, what it refuses."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import monai.bundle
import nibabel
import numpy as np
import pytest
import torch
from monai.data import decollate_batch

from swin_unetr import imaging, predict
from swin_unetr.exporting.bundle import BundleOptions
from swin_unetr.labels import Labels
from swin_unetr.prediction import ensemble
from swin_unetr.prediction.windows import Windows
from swin_unetr.preprocessing import Preprocessing

from .. import segmenter
from ..exporter import BUNDLE, CT, ROI, checkpoint, run

TUMOUR = Labels({"whole": [2, 1, 4], "core": [1, 4], "enhancing": [4]}, overlapping=True)
MR = Preprocessing(spacing=None, orientation=None, intensity="zscore")


@pytest.fixture(scope="module")
def organs(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint, and a folder with its bundle."""
    folder = tmp_path_factory.mktemp("organs")
    path = checkpoint(folder / "best.pt")
    assert run(path, folder / "out", "bundle")[0] == 0
    return path, folder / "out" / BUNDLE


@pytest.fixture(scope="module")
def tumour(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint of overlapping classes in images of two channels, and a folder with its bundle."""
    folder = tmp_path_factory.mktemp("tumour")
    path = checkpoint(folder / "best.pt", TUMOUR, MR, in_channels=2, use_v2=True)
    assert run(path, folder / "out", "bundle", bundle=BundleOptions("tumour", modality="MR"))[0] == 0
    return path, folder / "out/tumour"


def case(folder: Path, channels: int) -> Path:
    """A folder with an image that has its own axes and spacing."""
    values = np.stack([segmenter.image((37, 33, 30), seed) for seed in range(channels)], axis=-1)
    folder.mkdir()
    segmenter.nifti(folder / "case.nii.gz", values[..., 0] if channels == 1 else values, segmenter.affine("LPS"))
    return folder


def workflow(root: Path, images: Path, out: Path, **override) -> monai.bundle.ConfigWorkflow:
    found = monai.bundle.ConfigWorkflow(
        config_file=str(root / "configs/inference.json"),
        meta_file=str(root / "configs/metadata.json"),
        logging_file=False,
        workflow_type="inference",
        bundle_root=str(root),
        dataset_dir=str(images),
        output_dir=str(out),
        **override,
    )
    found.initialize()
    return found


def as_monai_label_does(root: Path, images: Path, out: Path, **override) -> None:
    """Build the network, load the weights into it, and run the parts one by one."""
    parts = workflow(root, images, out, **override)
    net = parts.network_def
    net.load_state_dict(torch.load(root / "models/model.pt", weights_only=True))
    batch = next(iter(parts.parser.get_parsed_content("dataloader")))
    with torch.no_grad():
        batch["pred"] = parts.inferer(batch["image"], net.eval())
    for item in decollate_batch(batch):
        parts.postprocessing(item)


def same_as_predict(written: Path, image: Path, path: Path) -> None:
    """The label map of the bundle is that of our network, transforms and sliding window, on the image's grid."""
    (source,) = imaging.find([image], 1.0)
    expected = predict.segment(
        source.read(), ensemble.load([path], torch.device("cpu")), Windows(), torch.device("cpu")
    )
    found, of = nibabel.load(written), nibabel.load(image)
    assert found.shape == of.shape[:3]
    assert found.get_data_dtype() == np.uint8
    np.testing.assert_allclose(found.affine, of.affine, atol=1e-4)
    values = np.asarray(found.dataobj)
    labels = np.asarray(expected.labels)
    assert len(np.unique(labels)) > 2
    assert (values == labels).mean() > 0.9999


@pytest.mark.parametrize("network", ["monai.networks.nets.SwinUNETR", "swin_unetr.SwinUNETR"])
def test_the_bundle_segments_as_predict_does(network, organs, tmp_path):
    root, images = organs[1], case(tmp_path / "images", 1)
    as_monai_label_does(root, images, tmp_path / "labels", **{"network_def#_target_": network})
    same_as_predict(tmp_path / "labels/case_seg.nii.gz", images / "case.nii.gz", organs[0])


def test_a_bundle_of_overlapping_classes(tumour, tmp_path):
    path, root = tumour
    images = case(tmp_path / "images", 2)
    as_monai_label_does(root, images, tmp_path / "labels")
    same_as_predict(tmp_path / "labels/case_seg.nii.gz", images / "case.nii.gz", path)


def test_a_bundle_decides_even_odds_as_predict_does(tumour):
    """A sigmoid of exactly one half counts as positive in neither."""
    steps = json.loads((tumour[1] / "configs/inference.json").read_text())["postprocessing"]["transforms"]
    decide = next(step["func"] for step in steps if step["_target_"] == "Lambdad")
    probabilities = torch.tensor([[0.5, 0.6, 0.7, 0.7], [0.4, 0.5, 0.6, 0.6], [0.5, 0.5, 0.5, 0.6]]).view(3, 1, 1, 4)
    found = eval(decide.removeprefix("$"), {"torch": torch})(probabilities)
    assert found.flatten().tolist() == [0, 1, 2, 3]
    assert not any(step["_target_"] == "AsDiscreted" for step in steps)


def test_monais_evaluator_runs_the_bundle(organs, tmp_path):
    pytest.importorskip("ignite", reason="MONAI's evaluator needs pytorch-ignite, which is not installed")
    root, images = organs[1], case(tmp_path / "images", 1)
    evaluation = workflow(root, images, tmp_path / "labels")
    assert evaluation.check_properties() == []
    evaluation.run()
    evaluation.finalize()
    same_as_predict(tmp_path / "labels/case_seg.nii.gz", images / "case.nii.gz", organs[0])


def test_metadata_is_what_monai_label_reads(organs, tumour):
    """Labels in MONAI Label are names by value of the label map, read from the first output."""
    for root, classes in ((organs[1], {"liver": 6, "spleen": 1}), (tumour[1], {"whole": 2, "core": 1})):
        metadata = json.loads((root / "configs/metadata.json").read_text())
        needed = {"version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"}
        needed |= {"task", "description", "authors", "copyright", "network_data_format"}
        assert needed <= set(metadata)
        tensors = metadata["network_data_format"]
        ((image_key, image),), ((pred_key, pred),) = tensors["inputs"].items(), tensors["outputs"].items()
        assert (image_key, pred_key) == ("image", "pred")
        for tensor in (image, pred):
            assert {"type", "format", "modality", "num_channels", "spatial_shape", "dtype", "value_range"} <= set(
                tensor
            )
            assert {"is_patch_data", "channel_def"} <= set(tensor)
            assert tensor["type"] == "image"
        assert (pred["format"], image["spatial_shape"]) == ("segmentation", list(ROI))
        labels = {name: int(value) for value, name in pred["channel_def"].items()}
        assert classes.items() <= labels.items()
        assert labels["background"] == 0
    assert (image["modality"], image["num_channels"], image["value_range"]) == ("MR", 2, [])
    assert labels["enhancing"] == 4


def test_a_checkpoint_brings_no_code_into_a_bundle(tmp_path):
    """MONAI evaluates text that starts with "$"."""
    labels = {"classes": {"$print(1)": [1], "b": [2]}, "overlapping": False}
    content = {"labels": labels, "preprocessing": asdict(CT)}
    status, printed = run(checkpoint(tmp_path / "best.pt", content=content), tmp_path / "out", "bundle")
    assert status == 1
    assert "the checkpoint says '$print(1)'; accepted in a bundle is text without $, @ and %" in printed
    assert not os.listdir(tmp_path / "out")


@pytest.mark.parametrize(
    "odd", [{"preprocessing": asdict(CT) | {"window": ["$print(1)", "~"]}}, {"roi": [math.inf] * 3}]
)
def test_a_checkpoint_with_something_else_where_a_number_belongs_is_refused(odd, tmp_path):
    labels = {"classes": {"a": [1], "b": [2]}, "overlapping": False}
    content = {"labels": labels, "preprocessing": asdict(CT)} | odd
    with pytest.raises(ValueError, match="does not describe its own weights"):
        run(checkpoint(tmp_path / "best.pt", content=content), tmp_path / "out", "bundle")
    assert not (tmp_path / "out").exists()


def test_a_bundle_of_legacy_merging_names_our_network(tmp_path):
    path = checkpoint(tmp_path / "best.pt", downsample="merging_legacy")
    assert run(path, tmp_path / "out", "bundle")[0] == 0
    root = tmp_path / "out" / BUNDLE
    assert (
        json.loads((root / "configs/inference.json").read_text())["network_def"]["_target_"] == "swin_unetr.SwinUNETR"
    )
    assert "swin-kernels has to be installed" in (root / "docs/README.md").read_text()
    versions = json.loads((root / "configs/metadata.json").read_text())["required_packages_version"]
    assert "swin-kernels" in versions


def test_a_bundle_of_2d_is_refused(tmp_path):
    path = checkpoint(tmp_path / "best.pt", roi=(64, 32), spatial_dims=2)
    with pytest.raises(ValueError, match="formats has bundle, and the network is one for images in 2D"):
        run(path, tmp_path / "out", "bundle")
    status, printed = run(path, tmp_path / "out", "torchscript")
    assert status == 0, printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../x"}, "bundle.name is '../x'; accepted are letters"),
        ({"overlap": 1.0}, "bundle.overlap is 1.0; accepted is 0 ≤ overlap < 1"),
        ({"windows": 0}, "bundle.windows is 0; accepted is a number ≥ 1"),
    ],
)
def test_bundle_options_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BundleOptions(**options)
